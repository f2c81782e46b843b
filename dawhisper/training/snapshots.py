"""Snapshots of a training run: everything that is needed to go on as if nothing had happened.

One file `checkpoint-STEP.pt` holds tensors and plain values alone and is loaded with `weights_only`. It is written
under a temporary name and renamed, so that a file of that name is always whole.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dawhisper.errors import CheckpointError, one_line
from dawhisper.files import replacing

NAME = re.compile(r"checkpoint-(\d+)\.pt")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def snapshots(folder: Path) -> list[Path]:
    """The folder's snapshots, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write_snapshot(state: dict[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Save under a temporary name, rename, and remove all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:07d}.pt"
    with replacing(path) as part, part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    for old in snapshots(folder)[:-keep]:
        old.unlink()
    return path


def read_snapshot(path: Path) -> dict[str, Any]:
    """Load a snapshot onto the CPU. Raises CheckpointError, one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}; resume=auto takes the newest of the run's folder") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no training checkpoint ({one_line(error)}); take another"
        ) from None
    if not isinstance(state, dict) or "step" not in state or "student" not in state:
        raise CheckpointError(f"{path} is no training checkpoint; a model file goes into model.name instead")
    return state


def student_state(student: nn.Module, sharded: bool) -> dict[str, Any]:
    """The weights in full, on the device; with sharding every process must ask, and each gets them."""
    return (
        get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))
        if sharded
        else student.state_dict()
    )


def optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """The moments in full; with sharding every process must ask, and the first one gets them, on the CPU."""
    return get_optimizer_state_dict(student, optimizer, options=FULL) if sharded else optimizer.state_dict()


def load_snapshot(
    student: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], sharded: bool, sharded_then: bool
) -> None:
    """Put a snapshot's weights and moments back."""
    if sharded != sharded_then:
        raise CheckpointError(
            f"the checkpoint was written with loop.fsdp={str(sharded_then).lower()}; resume with that"
        )
    try:
        if sharded:
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(student, state["student"], options=options)
            set_optimizer_state_dict(student, optimizer, state["optimizer"], options=options)
        else:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model or recipe ({one_line(error)})") from None


def rng_state() -> dict[str, Any]:
    """The state of every global random generator that torch and Python have in this process."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
