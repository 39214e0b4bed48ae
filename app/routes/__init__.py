"""The routes: each translates between HTTP and the engine, and decides nothing."""
