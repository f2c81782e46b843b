"""Every recording is in one part, whatever the number of parts, and the parts are the same at every call."""

from __future__ import annotations

import pytest

from dawhisper.bulk.shards import Shard
from dawhisper.errors import OptionError


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_parts_are_disjoint_and_all(count: int) -> None:
    items = list(range(10))
    parts = [Shard.of(f"{i}/{count}").part(items) for i in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard.of(None).part(items) == items


def test_from_the_launcher() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert Shard.of("auto", torchrun) == Shard(3, 4, 0)
    assert Shard.of("auto", slurm) == Shard(6, 8, 1)
    assert Shard.of("auto", slurm | torchrun) == Shard(3, 4, 0)
    with pytest.raises(OptionError, match="--shard I/N"):
        Shard.of("auto", {})


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(OptionError, match="I/N"):
        Shard.of(text)
