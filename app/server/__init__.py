"""The server process: uvicorn, signal handling, and HTTP connections with timeouts and limits."""
