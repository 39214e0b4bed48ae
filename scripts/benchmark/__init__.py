"""Benchmarks of the service and of what a user would pick instead; `python -m scripts.bench` runs them."""
