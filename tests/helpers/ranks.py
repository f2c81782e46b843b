"""Two processes that work together, as torchrun starts them: this one is the first."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def two_ranks(*command: str) -> Iterator[None]:
    """What runs inside is rank 0; rank 1 runs Python with this command beside it, and must end well too."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("WORLD_SIZE", 2), ("RANK", 0)):
            patch.setenv(name, str(value))
        environment = os.environ | {"RANK": "1", "PYTHONPATH": str(ROOT)}
        other = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
        try:
            yield
            assert other.wait(60) == 0
        finally:
            other.kill()
            other.wait()
