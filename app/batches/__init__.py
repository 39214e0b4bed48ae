"""Files and batches: stores lines of requests, answers them in the background, and keeps the results."""
