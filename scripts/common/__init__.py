"""Code that several scripts share: arguments, progress, files, pictures, MNIST, drawing."""
