"""Training on small made data: `train.py` with few steps, and what it logs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.noise import torchaudio_loads
from helpers.ranks import two_ranks

import train

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = str(ROOT / "train.py")
SPEED = () if torchaudio_loads() else ("augment.speed_prob=0",)


def arguments(world: dict[str, Path], out: Path, *overrides: str) -> list[str]:
    return [
        str(ROOT / "configs/everything.yaml"),
        f"model.name={world['model']}",
        f"data.train={world['train']}",
        f"data.noise={world['noise']}",
        f"out={out}",
        "device=cpu",
        "data.workers=0",
        "data.batch_size=4",
        "data.targets.prompt=0",
        "loop.steps=4",
        "loop.log_every=1",
        "loop.save_every=100",
        "optim.warmup=2",
        "optim.lr=1e-3",
        "optim.lr_new=1e-3",
        "evaluate.max_tokens=5",
        "evaluate.kinds=white",
        *SPEED,
        *overrides,
    ]


def command(world: dict[str, Path], out: Path, *overrides: str, processes: int = 0) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return [sys.executable, *launch, TRAIN, *arguments(world, out, *overrides)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def records(out: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def curve(out: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in records(out, key)]


def run(world: dict[str, Path], out: Path, *overrides: str) -> list[float]:
    assert train.main(arguments(world, out, *overrides)) == 0
    return curve(out)


def run_in_two(world: dict[str, Path], out: Path, *overrides: str) -> list[float]:
    """In two processes, of which this one is the first."""
    with two_ranks(TRAIN, *arguments(world, out, *overrides)):
        return run(world, out, *overrides)
