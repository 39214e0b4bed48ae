"""Reads requests and sends answers over HTTP, for every protocol."""
