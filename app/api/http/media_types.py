"""The media types of requests and answers."""

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
GIF, WEBP = "image/gif", "image/webp"
OCTETS = "application/octet-stream"
MULTIPART = "multipart/form-data"
PROBLEM_JSON = "application/problem+json"
TEXT = "text/plain"
ANIMATIONS = (WEBP, GIF)
FORMATS = (JSON, PNG, ZIP, EVENTS, *ANIMATIONS)  # If q values in Accept are equal, the first of these types is chosen.
