"""Command-line programs for training, sampling, evaluation, benchmarks and plots. They import `model`, never `app`."""
