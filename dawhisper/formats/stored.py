"""What every stored model gives: dimensions, tensors, heads; and reading its files without running code from them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dawhisper.errors import CheckpointError, one_line
from dawhisper.model import DualOptions, ModelDimensions


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, under openai-whisper's parameter names; the tensors may still lie in the file."""

    source: str
    dims: ModelDimensions
    tensors: dict[str, Tensor]
    dual: DualOptions | None = None
    variable_audio_ctx: bool = False
    knows_silence: bool = False
    alignment_heads: tuple[tuple[int, int], ...] | None = None  # (layer, head); None: Whisper's default


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
        return
    content = unpickled(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: it holds no tensors; download the folder again")
    yield from content.items()


def unpickled(path: Path) -> Any:
    """The content of a torch file, which may hold tensors and plain containers and nothing else."""
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK" and not zipped:
        raise CheckpointError(f"{path}: the file is cut off; download or copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL (\S+)", str(e))
        if found:
            raise CheckpointError(
                f"{path}: refused, because reading this file would run code from it ({found[1]}); get the model as "
                "safetensors, or save its tensors alone"
            ) from e
        raise CheckpointError(
            f"{path}: not a checkpoint, or damaged (tensors and plain tables are read, never pickled code); "
            "download or copy it again"
        ) from e
    except Exception as e:  # torch.load fails in many ways on a file that is not one of its own
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({one_line(e)}); download or copy it again") from e


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path}: the file is cut off or damaged ({one_line(e)}); download or copy it again"
        ) from e


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(e)}); download it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    return content


def checked_dims(source: Path, values: Any) -> ModelDimensions:
    names = [field.name for field in dataclasses.fields(ModelDimensions)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise CheckpointError(f"{source}: its dimensions are not those of a Whisper model ({', '.join(names)})")
    if not all(type(v) is int and 0 < v < 1_000_000 for v in values.values()):
        raise CheckpointError(f"{source}: its dimensions are out of range: {values}")
    if max(values["n_audio_layer"], values["n_text_layer"]) > 1000:  # a model of a million layers takes ages to make
        raise CheckpointError(f"{source}: its dimensions are out of range: {values}")
    for state, head in (("n_audio_state", "n_audio_head"), ("n_text_state", "n_text_head")):
        if values[state] % values[head]:
            raise CheckpointError(f"{source}: {state}={values[state]} does not divide into {values[head]} heads")
    return ModelDimensions(**values)


def checked_tensors(source: Path, values: Any) -> dict[str, Tensor]:
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{source}: its weights are not a plain table of tensors")
    return {str(name): tensor for name, tensor in values.items()}


def head_pairs(source: Path, heads: Any) -> tuple[tuple[int, int], ...] | None:
    if heads is None:
        return None
    try:
        return tuple((int(layer), int(head)) for layer, head in heads)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{source}: alignment_heads is not a list of [layer, head] pairs") from e
