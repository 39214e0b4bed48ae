"""What a user would write or pick instead of this service: the same weights and kernels, each tuned as its docs say."""
