"""Many recordings: what was named, shared out between machines and devices, and what became of each."""

from .transcriber import SPARK_SCHEMA, Transcriber, missing

__all__ = ["SPARK_SCHEMA", "Transcriber", "missing"]
