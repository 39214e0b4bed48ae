"""The process: uvicorn, signals, and HTTP connections with timeouts and limits."""
