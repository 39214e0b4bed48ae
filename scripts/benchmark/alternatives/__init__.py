"""Alternative servers for comparison: the same weights and compiled step, tuned as the documentation of each says."""
