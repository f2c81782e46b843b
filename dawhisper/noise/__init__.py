"""Noise: made, mixed in, augmented with."""
