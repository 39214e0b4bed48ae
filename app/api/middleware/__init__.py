"""The ASGI middleware that surrounds the routes."""
