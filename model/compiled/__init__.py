"""Ahead-of-time compilation of the reverse step, and how the process keeps memory."""
