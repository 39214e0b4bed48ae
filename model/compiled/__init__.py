"""Ahead-of-time compilation of the reverse step, and a setting that keeps freed memory in the process."""
