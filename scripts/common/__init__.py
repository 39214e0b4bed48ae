"""Code that several scripts share: arguments, progress output, errors, figures, MNIST and image generation."""
