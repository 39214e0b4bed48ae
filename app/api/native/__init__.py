"""The service's own API: one module for each operation, with its path, schemas, formats and errors."""
