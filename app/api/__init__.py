"""The HTTP API: routes, schemas, answers and middleware."""
