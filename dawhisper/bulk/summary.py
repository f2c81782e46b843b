"""What became of all recordings: counted for the end, and written down one by one."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dawhisper.errors import OptionError

from .inputs import Input
from .outcomes import Outcome

SHOWN = 20  # failures that are told again at the end


@dataclass
class Summary:
    """Counts what becomes of recordings; with a file, a line of JSON for each is added to it as soon as it is known.

    The lines of a call that was stopped, and those of other shards, may stand in the same file.
    """

    file: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    audio: float = 0.0  # seconds
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """OptionError where the file can't be written."""
        try:
            if self.file is not None:
                self.file.open("a").close()
        except OSError as error:
            raise OptionError(f"can't write {self.file}: {error.strerror}; choose another with --summary") from None

    def skip(self, item: Input) -> None:
        self._add("skipped", {"audio": item.label, "output": item.output})

    def add(self, outcome: Outcome) -> None:
        error = outcome.error
        status = "interrupted" if outcome.interrupted else "failed" if error else "done"
        line = {"audio": outcome.item.label, "output": outcome.item.output, "duration": round(outcome.duration, 2)}
        if outcome.result is not None:
            line["language"] = outcome.result.language
        if error:
            line["error"] = error
            self.failures.append(error)
        self.audio += outcome.duration if status == "done" else 0.0
        self._add(status, line)

    def close(self) -> str:
        """Write the last line of the file; the summary in words."""
        seconds = time.monotonic() - self.started
        speed = self.audio / max(seconds, 1e-9)
        numbers = {"files": sum(self.counts.values()), **{s: self.counts[s] for s in ("done", "skipped", "failed")}}
        hours = {"hours": round(self.audio / 3600, 4), "seconds": round(seconds, 1), "times_real_time": round(speed, 2)}
        self._write({"status": "end", **numbers, **hours})
        rest = "".join(f", {self.counts[s]} {s}" for s in ("skipped", "failed") if self.counts[s])
        first = f"{self.counts['done']} of {numbers['files']} files done{rest}"
        told = [first + f": {self.audio / 3600:.2f} h of audio in {seconds / 3600:.2f} h, {speed:.1f} times real time"]
        told += [f"failed: {why}" for why in self.failures[:SHOWN]]
        if len(self.failures) > SHOWN:
            told.append(f"and {len(self.failures) - SHOWN} more" + (f", all in {self.file}" if self.file else ""))
        return "\n".join(told)

    def _add(self, status: str, line: dict[str, Any]) -> None:
        self.counts[status] += 1
        self._write({**line, "status": status})

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
