"""Commands that measure, draw and convert models."""
