"""Measuring recognition in noise."""
