"""What a person runs offline: training, sampling, judging and plotting. Knows the model, never the service."""
