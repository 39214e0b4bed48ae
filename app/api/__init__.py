"""What a client sees: routes, schemas, answers and middleware."""
