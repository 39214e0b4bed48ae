"""Alternative servers for comparison: the same weights and compiled step, tuned as their documentation says."""
