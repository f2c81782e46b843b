"""dawhisper's own file: safetensors with the configuration as JSON in its metadata; weights as fp32, fp16 or int8."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dawhisper.errors import CheckpointError, OptionError, one_line
from dawhisper.files import replacing
from dawhisper.model import DualOptions, Whisper

from .stored import Stored, checked_dims, open_safetensors

FORMAT_VERSION = 1
METADATA_KEY = "dawhisper"  # the safetensors metadata entry that holds the configuration
SCALE_SUFFIX = ":scale"  # fp16 scales [rows] of the int8 tensor of the same name


def save_model(
    model: Whisper,
    path: str | os.PathLike[str],
    dtype: str = "fp16",
    base_model: str | None = None,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write a dawhisper safetensors file, under a temporary name first.

    Parameters
    ----------
    dtype: "fp16"; "int8", which stores the weights of linear layers, convolutions and the token embedding as int8 with
        one fp16 scale per output row (the largest error is 1/254 of the row's largest weight) and the rest as fp16;
        or "fp32"
    base_model, recipe: where the model comes from, kept in the file for `read_config`; recipe must be plain JSON
    """
    if dtype not in ("fp16", "int8", "fp32"):
        raise OptionError(f"a model is stored as fp16, int8 or fp32, not {dtype!r}")
    config = {
        "format_version": FORMAT_VERSION,
        "dims": dataclasses.asdict(model.dims),
        "dual": None if model.dual is None else dataclasses.asdict(model.dual),
        "variable_audio_ctx": model.variable_audio_ctx,
        "knows_silence": model.knows_silence,
        "alignment_heads": model.alignment_heads.nonzero().tolist(),
        "base_model": base_model,
        "recipe": recipe,
        "storage": dtype,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors.update(packed(name, tensor.detach().to("cpu", torch.float32), dtype))
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(config)})
            part.chmod(0o644)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{target}: cannot be written ({one_line(e)}); choose another folder or free some space"
        ) from e


def read_dawhisper(path: Path) -> Stored:
    with open_safetensors(path) as file:
        config = read_configuration(path, file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        dual = None if config["dual"] is None else DualOptions(**config["dual"])
        heads = tuple((int(layer), int(head)) for layer, head in config["alignment_heads"])
        variable, silence = bool(config["variable_audio_ctx"]), bool(config.get("knows_silence"))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its configuration is damaged ({one_line(e)}); save the model again") from e
    return Stored(str(path), checked_dims(path, config.get("dims")), packed, dual, variable, silence, heads)


def read_configuration(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: no dawhisper configuration in it; for a Hugging Face model name its folder, with config.json"
        )
    try:
        config = json.loads(text)
        version = int(config["format_version"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its configuration is damaged ({one_line(e)}); save the model again") from e
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: written in format {version} by a newer dawhisper; update dawhisper to read it")
    return config


def packed(name: str, tensor: Tensor, dtype: str) -> Iterable[tuple[str, Tensor]]:
    """A float32 tensor as it is stored: one entry, or for int8 the values and their scales."""
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} has NaN or infinite values; a model that diverged is not saved")
    if dtype == "fp32":
        return [(name, tensor.contiguous())]
    if dtype == "int8" and tensor.ndim > 1 and name.endswith(".weight") and ".gate." not in name:
        values, scale = quantize_rows(tensor)
        return [(name, values), (name + SCALE_SUFFIX, scale)]
    half = tensor.half().contiguous()
    if not half.isfinite().all():
        raise CheckpointError(f"{name} has values beyond the range of fp16; save with dtype='fp32'")
    return [(name, half)]


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, ...] -> int8 values of the same shape and fp16 scales [rows], symmetric around zero."""
    rows = tensor.flatten(1)
    largest = rows.abs().amax(1)
    scale = (largest / 127).clamp(min=2.0**-24).half()  # fp16's smallest step
    # rounded up where fp16 rounded it down, so that no value is cut off
    scale = torch.where(scale.float() * 127 < largest, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    values = (rows / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return values.view_as(tensor), scale


def unpacked(tensor: Tensor, scale: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return tensor.to(device, dtype, copy=True)  # a copy, because the tensor may be a view of the file
    rows = tensor.to(device).flatten(1).float() * scale.to(device).float()[:, None]
    return rows.view(tensor.shape).to(dtype)
