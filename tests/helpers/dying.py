"""Work that kills its process, for the tests of what becomes of the rest: the process imports it from here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from dawhisper.bulk.inputs import Input
from dawhisper.bulk.outcomes import Outcome
from dawhisper.errors import OptionError
from dawhisper.reading import Readers


@dataclass(frozen=True)
class Dying:
    """Takes up to three recordings at a time; dies with one called "bad"; has no model for the device "none"."""

    def load(self, device: str) -> str:
        if device == "none":
            raise OptionError("device none: there is none")
        return device

    def run(self, model: str, inputs: Iterator[Input], readers: Readers) -> Iterator[Outcome]:
        while held := list(islice(inputs, 3)):
            if any("bad" in item.label for item in held):
                os.kill(os.getpid(), signal.SIGKILL)
            yield from (Outcome(item, duration=float(os.getpid())) for item in held)
