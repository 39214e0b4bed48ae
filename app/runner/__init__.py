"""Computes reverse steps on the device. This is the only part of the service that imports torch."""
