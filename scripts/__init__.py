"""Command-line programs for training, sampling, evaluation, plots and measurements. They import `app` and `model`."""
