"""The routes. They translate between HTTP and the engine."""
