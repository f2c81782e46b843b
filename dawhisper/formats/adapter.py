"""PEFT's LoRA adapters for Whisper: what they add to the weights of the model that they were trained on.

An adapter holds A [r, in] and B [out, r] of some linear layers; a layer's weight [out, in] becomes W + scale B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dawhisper.errors import CheckpointError

PREFIX = "base_model.model."
PART = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+?)\.(?P<part>lora_A|lora_B)(?:\.[^.]+)?\.weight$")


def merged(
    source: str,
    config: Mapping[str, Any],
    adapter: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    named: Callable[[str], str],
) -> dict[str, Tensor]:
    """A model's weights with an adapter's in them; `named` gives the weights' name for the adapter's.

    CheckpointError for other kinds of adapters, and for one that was not trained on this model.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise CheckpointError(
            f"{source}: it is an adapter of the kind {kind}: merge it into its model first, with peft"
        )
    result = dict(weights)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        if found := PART.match(name):
            halves.setdefault(found["layer"], {})[found["part"]] = tensor
            continue
        whole = named(re.sub(r"\.(modules_to_save|base_layer)(\.default)?\.", ".", name).removeprefix(PREFIX))
        if "lora_" in name or whole not in weights:
            raise CheckpointError(f"{source}: {name} belongs to no layer of its model; merge it with peft first")
        result[whole] = tensor
    for layer, parts in halves.items():
        name = named(f"{layer}.weight")
        if set(parts) != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{source}: {layer} has but one of lora_A and lora_B; get the adapter again")
        change = _change(config, layer, parts["lora_A"], parts["lora_B"])
        if name not in weights or change is None or change.shape != weights[name].shape:
            raise CheckpointError(f"{source}: {layer} does not fit its model; was the adapter trained on another one?")
        result[name] = weights[name].float() + change
    return result


def _change(config: Mapping[str, Any], layer: str, a: Tensor, b: Tensor) -> Tensor | None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return None
    rank = a.shape[0]
    alpha = _of_layer(config.get("alpha_pattern"), layer, config.get("lora_alpha") or config.get("r") or rank)
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    change = scale * (b.float() @ a.float())
    return change.T if config.get("fan_in_fan_out") else change


def _of_layer(pattern: object, layer: str, default: float) -> float:
    """The value of the first pattern that a layer's name ends with, as in PEFT."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if re.match(rf"(.*\.)?({key})$", layer):
            return float(value)
    return default
