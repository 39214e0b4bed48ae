"""The runner: computes reverse steps on the device. This is the only package of the service that imports torch."""
