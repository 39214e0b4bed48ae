"""The HTTP API: routes, schemas, responses and middleware."""
