"""A training recipe: frozen options read from YAML, overridden by `key=value`, checked before anything starts.

    recipe = read_recipe("configs/base_noise.yaml", ["optim.lr=1e-4", "loop.steps=200"])

A file may name another as its `base:` (relative to itself) and change only what differs. Unknown keys are errors that
name the nearest known ones; values of the wrong type are errors that say which type is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dawhisper.data.loader import TargetOptions
from dawhisper.errors import OptionError
from dawhisper.model import DualOptions
from dawhisper.noise.augment import AugmentOptions

T = TypeVar("T")


# Whisper's own encoder; its own decoder, and of that the tokens' embeddings alone; all of the second branch, and of
# that what lies in the encoder: its own layers and the layer mixture
FREEZABLE = ("encoder", "primary", "embedding", "secondary", "memory")


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

    name: str = "base"
    teacher: str | None = None
    dual: bool = True
    branch: DualOptions = field(default_factory=DualOptions)
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DataOptions:
    """What to train and to choose on: manifests, shards or folders of them; noise also as folders of audio.

    noise, rir, babble: real noises, room responses, and speech to make babble of (without it: the batch's other
    clips). dev, dev_noise: for the evaluation. batch_size: windows per device and micro-batch; workers: processes that
    decode; in_memory: all audio stays on the device as int16 (small data). spec_augment: mask bands and stretches of
    what the student hears; snr_curriculum: steps over which the lowest SNR falls from the highest to its own.
    """

    train: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    rir: tuple[str, ...] = ()
    babble: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    dev_noise: tuple[str, ...] = ()
    batch_size: int = 32
    workers: int = 4
    in_memory: bool = False
    spec_augment: bool = False
    snr_curriculum: int = 0
    targets: TargetOptions = field(default_factory=TargetOptions)


@dataclass(frozen=True)
class ObjectiveOptions:
    """Weights of the objectives, see losses.py; 0 leaves one out.

    cross_entropy: transcripts, or the teacher's text; silence: noise-only windows get Whisper's no-speech target;
    logits, encoder, attention: label-free distillation from the teacher (encoder: the secondary's memory learns it
    where it has layers of its own, else the encoder output); gate: supervision by the mixture's SNR;
    noise_attention, noise_mel: what the secondary branch should know of the noise (`noise_layers`: which decoder
    layers attend to it, None = all).
    """

    cross_entropy: float = 0.0
    label_smoothing: float = 0.0
    silence: float = 0.1
    logits: float = 1.0
    temperature: float = 1.0
    encoder: float = 1.0
    attention: float = 1.0
    gate: float = 0.1
    gate_centre_db: float = 7.5
    gate_width_db: float = 5.0
    noise_attention: float = 0.0
    noise_layers: tuple[int, ...] | None = None
    noise_mel: float = 0.0


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with warm-up and cosine decay to `final` of the peak rate.

    lr: peak rate of Whisper's own weights; lr_new: of the second branch and its noise embeddings; lr_gate: of the
    gate, the layer mixture and the noise scales, which start at a constant.
    clip: largest gradient norm, 0 = off; ema: decay of the averaged weights that are evaluated and saved, 0 = off.
    """

    lr: float = 2e-5
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
    encoder positions. max_bad_steps: non-finite steps in a row that end the run. memory_share: of the GPU's memory that
    this process may take, for several runs side by side.
    """

    steps: int = 1500
    accumulate: int = 1
    precision: str = "auto"
    compile: str = "auto"
    graph: bool = False
    attention: str = "flash"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    deterministic: bool = False
    variable_ctx: float = 0.0
    ctx_multiple: int = 250
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    max_bad_steps: int = 20
    memory_share: float = 1.0


@dataclass(frozen=True)
class EvaluateOptions:
    """Dev WER, clean and in noise that is the same every time (mixtures.py: kinds real, babble, white, reverb ...).

    every: steps between evaluations, 0 = never; per_clip: noisy conditions that each clip is heard in, taken in turn;
    clips: how many of each manifest to use, 0 = all; max_tokens: most tokens decoded a window; patience: evaluations
    without a better noisy WER that end the run, 0 = off.
    """

    every: int = 250
    kinds: tuple[str, ...] = ("real", "babble", "white")
    snr_db: tuple[float, ...] = (10.0, 5.0, 0.0)
    per_clip: int = 2
    clips: int = 0
    batch_size: int = 32
    max_tokens: int = 200
    patience: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs.

    resume: none, auto (the newest checkpoint of `out`, if any) or a checkpoint file; freeze: see FREEZABLE.
    """

    out: str = "runs/train"
    seed: int = 0
    device: str = "auto"
    resume: str = "none"
    dry_run: bool = False
    freeze: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)

    def __post_init__(self) -> None:
        _one_of("freeze", self.freeze, FREEZABLE)
        _one_of("loop.precision", [self.loop.precision], ("auto", "bf16", "fp16", "fp32"))
        _one_of("loop.compile", [self.loop.compile], ("auto", "off", "encoder", "blocks", "model"))
        _one_of("loop.attention", [self.loop.attention], ("default", "cudnn", "flash"))
        for key, value, least in (
            ("data.batch_size", self.data.batch_size, 1),
            ("loop.steps", self.loop.steps, 1),
            ("loop.accumulate", self.loop.accumulate, 1),
            ("loop.log_every", self.loop.log_every, 1),
            ("loop.save_every", self.loop.save_every, 1),
            ("loop.keep", self.loop.keep, 1),
            ("loop.ctx_multiple", self.loop.ctx_multiple, 1),
            ("objective.gate_width_db", self.objective.gate_width_db, 1e-3),
            ("objective.temperature", self.objective.temperature, 1e-3),
        ):
            if value < least:
                raise OptionError(f"{key} is {value}; it must be at least {least}")
        if not self.objective.cross_entropy and not self.objective.logits:
            raise OptionError("nothing teaches the decoder: set objective.cross_entropy or objective.logits above 0")
        if self.loop.fsdp and (self.optim.ema or self.loop.precision == "fp16"):
            raise OptionError("loop.fsdp goes with neither optim.ema nor loop.precision=fp16; use bf16 and no average")
        if self.loop.graph and (self.loop.fsdp or self.loop.precision == "fp16"):
            raise OptionError("loop.graph goes with neither loop.fsdp nor loop.precision=fp16; use bf16, unsharded")
        single = [k for k in ("gate", "noise_attention", "noise_mel") if getattr(self.objective, k)]
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
    return _build(Recipe, tree, "")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain values, for a checkpoint's metadata; `from_dict` reads them back."""
    return _plain(dataclasses.asdict(recipe))


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


def _build(kind: type[T], tree: Any, prefix: str) -> T:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise OptionError(f"{prefix.rstrip('.')} needs keys of its own, not {_describe(tree)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in tree:
        if key not in names:
            raise OptionError(f"unknown key {prefix}{key}; {_near(f'{prefix}{key}', prefix, names)}")
    values = {key: _coerce(value, hints[key], f"{prefix}{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ValueError as error:  # an option class that checks itself
        raise OptionError(str(error)) from None


def _near(key: str, prefix: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key[len(prefix) :], names, n=2, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(prefix + name for name in near) + "?"
    elsewhere = [known for known in _keys(Recipe) if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"{prefix.rstrip('.') or 'the recipe'} knows {', '.join(names)}"


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type of the annotation, or OptionError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return _coerce(value, option, key)
            except OptionError:
                continue
        return _coerce(value, options[-1], key)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    if origin is typing.Literal:
        if value not in arguments:
            raise OptionError(f"{key} is {value!r}; it must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        return _coerce_sequence(value, hint, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise OptionError(f"{key} needs keys of its own, not {_describe(value)}")
        return {k: _coerce(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
    raise OptionError(f"{key} must be {wanted}, not {_describe(value)}")


def _coerce_sequence(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    items = list(value) if isinstance(value, (list, tuple)) else [value]  # one item needs no brackets
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(items) != len(arguments):
            raise OptionError(f"{key} needs {len(arguments)} values, not {len(items)}: {value!r}")
        return tuple(_coerce(item, a, key) for item, a in zip(items, arguments))
    return origin(_coerce(item, arguments[0], key) for item in items)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}"


def _one_of(key: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
            raise OptionError(f"{key} is {value!r}; {hint}")
