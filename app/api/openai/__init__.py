"""The OpenAI Images API: its requests, its responses and its events."""
