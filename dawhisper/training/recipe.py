"""A training recipe: frozen options read from YAML, overridden by `key=value`, checked before anything starts.

    recipe = read_recipe("configs/base_noise.yaml", ["optim.lr=1e-4", "loop.steps=200"])

A file may name another as its `base:` (relative to itself) and change only what differs. Unknown keys are errors that
name the nearest known ones; values of the wrong type are errors that say which type is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dawhisper.data.loader import TargetOptions
from dawhisper.errors import OptionError
from dawhisper.model import DualOptions
from dawhisper.noise.augment import AugmentOptions

from .objective import ObjectiveOptions
from .option_types import Count, Several, Text

# Whisper's own encoder; its own decoder, and of that the tokens' embeddings alone; all of the second branch, and of
# that what lies in the encoder: its own layers and the layer mixture
Freezable = Literal["encoder", "primary", "embedding", "secondary", "memory"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: only true and false are booleans (not off, no, ...), and 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class ModelOptions:
    """The student and its teacher.

    name: the checkpoint to start from, a name or a file; teacher: the frozen model that hears the clean audio, by
    default the one that the student started from. decoder_layers, encoder_layers: keep only these layers of the start
    model, for distillation to a smaller student. dual: off trains a single-branch model, the control.
    """

    name: Text = "base"
    teacher: Text | None = None
    dual: bool = True
    branch: DualOptions = field(default_factory=DualOptions)
    encoder_layers: Several[int] | None = None
    decoder_layers: Several[int] | None = None


@dataclass(frozen=True)
class DataOptions:
    """What to train and to choose on: manifests, shards or folders of them; noise also as folders of audio.

    noise, rir, babble: real noises, room responses, and speech to make babble of (without it: the batch's other
    clips). dev, dev_noise: for the evaluation. batch_size: windows per device and micro-batch; workers: processes that
    decode; in_memory: all audio stays on the device as int16 (small data). spec_augment: mask bands and stretches of
    what the student hears; snr_curriculum: steps over which the lowest SNR falls from the highest to its own.
    """

    train: Several[Text] = ()
    noise: Several[Text] = ()
    rir: Several[Text] = ()
    babble: Several[Text] = ()
    dev: Several[Text] = ()
    dev_noise: Several[Text] = ()
    batch_size: Count = 32
    workers: int = 4
    in_memory: bool = False
    spec_augment: bool = False
    snr_curriculum: int = 0
    targets: TargetOptions = field(default_factory=TargetOptions)


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with warm-up and cosine decay to `final` of the peak rate.

    lr: peak rate of Whisper's own weights; lr_encoder: of those of its encoder, the same unless it is given; lr_new: of
    the second branch and its noise embeddings; lr_gate: of the gate, the layer mixture and the noise scales, which
    start at a constant.
    clip: largest gradient norm, 0 = off; ema: decay of the averaged weights that are evaluated and saved, 0 = off.
    """

    lr: float = 2e-5
    lr_encoder: float | None = None
    lr_new: float = 1e-4
    lr_gate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 100
    final: float = 0.05
    clip: float = 1.0
    ema: float = 0.0


@dataclass(frozen=True)
class LoopOptions:
    """How the loop runs.

    steps: optimiser steps; accumulate: micro-batches per step; precision: bf16, fp16, fp32 (with TF32) or auto (bf16
    on a GPU that has it, fp32 on the CPU); compile: off, encoder (its blocks, in seconds), blocks (the decoder's too),
    model (everything, minutes, with tokens padded to multiples of 64), auto (encoder on a GPU); graph: replay forward
    and backward pass on a GPU as CUDA graphs, one for each length of audio and text, with tokens padded to multiples of
    32; attention: the kernel to try first, flash, cudnn (plans each new shape for milliseconds) or default (torch's
    choice); fsdp: shard weights and optimiser over the devices; deterministic: bit-for-bit repeatable on a GPU too,
    slower.
    variable_ctx: share of steps that encode only as long as the batch's longest clip, rounded up to `ctx_multiple`
    encoder positions. save_every, save_minutes: a snapshot and the weights after so many steps, and at the first line
    of the log after so many minutes (0: by steps alone). max_bad_steps: non-finite steps in a row that end the run.
    memory_share: of the GPU's memory that torch may take; cuFFT and the like want some of their own beside it.
    """

    steps: Count = 1500
    accumulate: Count = 1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "off", "encoder", "blocks", "model"] = "auto"
    graph: bool = False
    attention: Literal["default", "cudnn", "flash"] = "flash"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    deterministic: bool = False
    variable_ctx: float = 0.0
    ctx_multiple: Count = 250
    log_every: Count = 10
    save_every: Count = 500
    save_minutes: float = 10.0
    keep: Count = 2
    max_bad_steps: int = 20
    memory_share: float = 0.9


@dataclass(frozen=True)
class DevSetOptions:
    """Dev WER, clean and in noise that is the same every time: kinds and SNRs as in evaluation/conditions.py.

    every: steps between evaluations, 0 = never; per_clip: noisy conditions that each clip is heard in, taken in turn;
    clips: how many of each manifest to use, 0 = all; max_tokens: most tokens decoded a window; patience: evaluations
    without a better noisy WER that end the run, 0 = off.
    """

    every: int = 250
    kinds: Several[str] = ("real", "babble", "white")
    snr_db: Several[float] = (10.0, 5.0, 0.0)
    per_clip: int = 2
    clips: int = 0
    batch_size: int = 32
    max_tokens: int = 200
    patience: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs.

    resume: none, auto (the newest checkpoint of `out`, if any) or a checkpoint file; freeze: see Freezable.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # of all options below it too

    out: Text = "runs/train"
    seed: int = 0
    device: str = "auto"
    resume: Text = "none"
    dry_run: bool = False
    freeze: Several[Freezable] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    evaluate: DevSetOptions = field(default_factory=DevSetOptions)

    def __post_init__(self) -> None:
        if not self.objective.cross_entropy and not self.objective.logits:
            raise OptionError("nothing teaches the decoder: set objective.cross_entropy or objective.logits above 0")
        if self.loop.fsdp and (self.optim.ema or self.loop.precision == "fp16"):
            raise OptionError("loop.fsdp goes with neither optim.ema nor loop.precision=fp16; use bf16 and no average")
        if self.loop.graph and (self.loop.fsdp or self.loop.precision == "fp16"):
            raise OptionError("loop.graph goes with neither loop.fsdp nor loop.precision=fp16; use bf16, unsharded")
        if self.objective.risk and (self.loop.graph or self.loop.fsdp):
            raise OptionError(
                "objective.risk goes with neither loop.graph nor loop.fsdp: it samples between the passes"
            )
        single = [
            k
            for k in ("hold_primary", "hold_secondary", "gate", "noise_attention", "noise_mel")
            if getattr(self.objective, k)
        ]
        if not self.model.dual and single:
            raise OptionError(f"model.dual is false, so nothing has a gate: set objective.{single[0]} to 0")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with `key=value` overrides such as `optim.lr=1e-4`.

    Raises OptionError, one line: unreadable file, unknown key (with near names), wrong type, impossible combination.
    """
    tree = _load_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise OptionError(f"{override!r} is not an override; write key=value, for example optim.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise OptionError(f"{override!r}: the value is not valid YAML; quote it") from None
        _set(tree, key.strip().split("."), value)
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build and check a recipe from nested dictionaries."""
    given = {key: value for key, value in tree.items() if value is not None}  # a section without lines
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(given))
    except ValidationError as error:
        raise OptionError(_complaint(error)) from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain values, for a checkpoint's metadata; `from_dict` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines `key: old -> new` for what differs between two recipes as dictionaries."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} -> {b}"


def _load_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise OptionError(f"{path}: the files' `base:` lines form a circle")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise OptionError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise OptionError(f"{path} holds {_describe(tree)}, not `key: value` lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_load_yaml(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = tree[key] = {}
        tree = inner
    tree[keys[-1]] = value


def _complaint(error: ValidationError) -> str:
    """The first of pydantic's findings as one line that names the key, with the nearest known name."""
    found, *others = error.errors()
    *section, name = path = [part for part in found["loc"] if isinstance(part, str) and part.isidentifier()] or [""]
    key, value, context = ".".join(path), found["input"], found.get("ctx", {})
    match found["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key}; {_near(section, name)}"
        case "literal_error":
            known = re.findall(r"'(.*?)'", context["expected"])
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
            return f"{key} is {value!r}; " + (
                f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
            )
        case "greater_than_equal":
            return f"{key} is {value}; it must be at least {context['ge']}"
        case "missing" | "too_long":
            wanted = context.get("max_length", len(value) + 1 + len(others))
            return f"{key} needs {wanted} values, not {len(value)}: {value!r}"
        case "value_error":  # options that check themselves
            return str(context["error"])
    wanted = {
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "string_type": "must be text",
        "dataclass_type": "needs keys of its own",
    }.get(found["type"])
    return f"{key} {wanted}, not {_describe(value)}" if wanted else f"{key}: {found['msg']}"


def _near(section: Sequence[str], name: str) -> str:
    """What may have been meant by an unknown name in a section of the recipe."""
    kind: Any = Recipe
    for part in section:
        kind = typing.get_type_hints(kind)[part]
    prefix, names = "".join(f"{part}." for part in section), [f.name for f in dataclasses.fields(kind)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(prefix + one for one in near) + "?"
    elsewhere = [known for known in _keys(Recipe) if known.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"{prefix.rstrip('.') or 'the recipe'} knows {', '.join(names)}"


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}"
