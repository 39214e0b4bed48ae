"""Ahead-of-time compilation of the reverse step, and related settings of the process.

compiler.py compiles, caches, checks and loads the step. It uses packing.py (weight layout), native.py (calls of the
compiled library), child.py (calls in a child process) and private_cache.py (trusted folders). kernel_cache.py prepares
the cache for a GPU. memory.py configures malloc.
"""
