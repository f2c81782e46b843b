"""Stored forms of a model."""
