"""Benchmarks of the service, of alternative servers and of the training. Run them with `python -m scripts.bench`."""
