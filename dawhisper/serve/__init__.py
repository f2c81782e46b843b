"""Serving: HTTP, live audio, the page."""
