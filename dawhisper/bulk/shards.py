"""Which part of the recordings this process does, of several that were started alike, on one machine or many."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dawhisper.errors import OptionError

T = TypeVar("T")
# rank, size and the rank on this machine, as torchrun and Slurm tell them
VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Shard:
    """The part `number` (from 1) of `count`; `local`: this process's rank on its machine, which tells its GPU."""

    number: int = 1
    count: int = 1
    local: int | None = None

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
        """From I/N, from 1/N to N/N, or "auto", which asks torchrun's variables and Slurm's."""
        if text is None:
            return cls()
        if text == "auto":
            for rank, size, local in VARIABLES:
                if rank in environment and size in environment:
                    place = int(environment[local]) if local in environment else None
                    return cls(int(environment[rank]) + 1, int(environment[size]), place)
            raise OptionError("--shard auto needs torchrun's or Slurm's variables, which are not set; give --shard I/N")
        parts = re.fullmatch(r"(\d+)/(\d+)", text)
        if not parts or not 1 <= int(parts[1]) <= int(parts[2]):
            raise OptionError(f"--shard is I/N, from 1/N to N/N, or auto; not {text}")
        return cls(int(parts[1]), int(parts[2]))

    def part(self, items: Sequence[T]) -> list[T]:
        """Every Nth item; the parts have none in common, and all together are all."""
        return list(items[self.number - 1 :: self.count])
