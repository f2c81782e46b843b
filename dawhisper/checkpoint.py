"""Names, files and folders -> model, and back.

Three kinds of checkpoint are read, told apart by their content: OpenAI's .pt, a Hugging Face Whisper folder, and
dawhisper's own safetensors file, whose metadata holds the configuration as JSON. Reading never runs code from a file.
Tensors go one by one into a model that has no memory of its own, so weights are never held twice.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import gzip
import hashlib
import os
import urllib.request
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dawhisper.fast.int8 import quantize_linears
from dawhisper.formats.adapter import merged
from dawhisper.formats.dawhisper import SCALE_SUFFIX, read_configuration, read_dawhisper, unpacked
from dawhisper.formats.foreign import foreign_format, refusal
from dawhisper.formats.huggingface import openai_name, read_huggingface, weights_of
from dawhisper.formats.stored import (
    Stored,
    checked_dims,
    checked_tensors,
    open_safetensors,
    read_json,
    tensors_of,
    unpickled,
)

from .device import choose_device, choose_dtype
from .errors import CheckpointError, one_line
from .files import replacing
from .model import DualOptions, Whisper

OWN_MODEL = "dawhisper-base"  # Whisper base with a second branch, trained for noise
MODEL_HELP = "dawhisper's own, the name of one of OpenAI's (base, small ...), or the path of a checkpoint"
ADAPTER = "adapter_config.json"


def available_models() -> list[str]:
    """The names that `load_model` knows: dawhisper's own model, and OpenAI's, which it can download."""
    return [OWN_MODEL, *_model_table()]


def load_model(
    name_or_path: str | os.PathLike[str] = OWN_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    download_root: str | os.PathLike[str] | None = None,
    dual: DualOptions | None = None,
) -> Whisper:
    """Load a Whisper model, single-branch or dual.

    Parameters
    ----------
    name_or_path: one of `available_models()`: dawhisper's own, trained for noise, which comes with the package, or one
        of OpenAI's, which is downloaded once; or an OpenAI .pt file, a Hugging Face Whisper folder (config.json and
        weights), a dawhisper .safetensors file, or a folder of ONNX graphs that `dawhisper export` made, which run on
        onnxruntime on the CPU
    device: None = cuda if there is one, else mps, else cpu
    dtype: "fp32", "fp16", "bf16" or a torch dtype of the weights; None = fp16 on cuda, fp32 elsewhere. "int8", for x86
        CPUs, is the fastest there and for inference alone: token steps in int8, the encoder in bf16 where the processor
        has AMX, in int8 otherwise. "auto", as the commands have it: int8 on a CPU with 8-bit dot products (AVX-512
        VNNI), else as None
    download_root: folder for downloads; None = openai-whisper's cache, ~/.cache/whisper
    dual: give a stock model a second branch with these options (with init="copy" it computes the same as before)

    As in openai-whisper, a model loaded by its name knows which heads word times are best read from; for an OpenAI
    file named by its path they are all heads of the upper half of the decoder.

    Raises
    ------
    CheckpointError: the model cannot be found, read or used; OptionError: unknown device or dtype
    """
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    name = os.fspath(name_or_path)
    if name in _model_table():
        path, heads = _downloaded(name, download_root), _alignment_table()[name]
    else:
        path, heads = _existing(name), None
    if (path / "encoder.onnx").is_file():
        from dawhisper.formats.onnx import load_onnx

        exported = load_onnx(path)
        if dual not in (None, exported.dual):
            raise CheckpointError(f"{path}: graphs can't be given another second branch; export the model that has it")
        return exported
    stored = _read(path, download_root)
    model = _build(stored, chosen, torch.float32 if kind == torch.int8 else kind)
    if heads is not None:
        set_alignment_heads(model, heads)
    if dual is not None and model.dual is None:
        model.add_second_branch(dual)
    elif dual is not None and model.dual != dual:
        raise CheckpointError(f"{path}: this model has a second branch already ({model.dual}); leave `dual` out")
    return quantize_linears(model.eval()) if kind == torch.int8 else model.eval()


def read_config(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration in a dawhisper file: dims, dual, base_model, recipe, storage ..., without its weights."""
    path = _existing(os.fspath(name_or_path))
    with open_safetensors(path) as file:
        return read_configuration(path, file.metadata())


# ---- names -> files


def _own_model() -> Path:
    """The file that comes with the package: inside it, or beside it in a source tree."""
    package = Path(__file__).parent
    places = [folder / "assets" / f"{OWN_MODEL}.int8.safetensors" for folder in (package, package.parent)]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(f"{places[0]} is missing: install dawhisper again, or name another model, for example base")


def _model_table() -> dict[str, str]:
    import whisper  # here, because it imports numba

    return whisper._MODELS


def _alignment_table() -> dict[str, bytes]:
    import whisper

    return whisper._ALIGNMENT_HEADS


def _existing(name: str) -> Path:
    if name == OWN_MODEL:
        return _own_model()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 1:
        raise CheckpointError(
            f"{name}: no such file or folder; name an OpenAI .pt file, a downloaded Hugging Face Whisper folder, "
            f"a dawhisper .safetensors file, or one of {', '.join(available_models())}"
        )
    near = difflib.get_close_matches(name, available_models(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(available_models())}"
    raise CheckpointError(f"unknown model {name!r}: {hint}, or a local file or folder by its path?")


def _downloaded(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The file of a named model, from the cache or from OpenAI; its SHA-256 is part of its address."""
    url = _model_table()[name]
    checksum, file_name = url.split("/")[-2:]
    target = _cache(root) / file_name
    if target.is_file():
        if _sha256(target) == checksum:
            return target
        warnings.warn(f"{target} is not the file that OpenAI published; it is downloaded again", stacklevel=3)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            _fetch(url, part)
            if _sha256(part) != checksum:
                raise CheckpointError(f"{url}: the download is damaged (its checksum is wrong); try again")
    except OSError as e:  # URLError is one
        reason = one_line(getattr(e, "reason", None) or e)
        raise CheckpointError(
            f"model {name!r} is not in {target.parent} and cannot be downloaded ({reason}); get {file_name} from {url} "
            f"by other means and name the file itself as the model, for example /path/to/{file_name}"
        ) from e
    return target


def _cache(root: str | os.PathLike[str] | None) -> Path:
    """Where downloads are kept."""
    cache = Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper"
    return cache if root is None else Path(root).expanduser()


def _fetch(url: str, target: Path) -> None:
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=60) as source, target.open("wb") as output:
        size = int(source.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="iB", unit_scale=True, unit_divisor=1024, desc=url.rsplit("/", 1)[-1]) as bar:
            while block := source.read(1 << 20):
                output.write(block)
                bar.update(len(block))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- files -> tensors


def _read(path: Path, root: str | os.PathLike[str] | None = None) -> Stored:
    """Tell the kind of checkpoint by its content, and read it; `root` is where an adapter's base may have been kept."""
    try:
        if path.is_dir() and (path / ADAPTER).is_file() and weights_of(path) is None:
            return _read_adapter(path, root)
        if path.is_dir():
            return read_huggingface(path)
        with path.open("rb") as file:
            head = file.read(9)
        if other := foreign_format(path):
            raise CheckpointError(f"{path}: {refusal(other)}")
        if not head:
            raise CheckpointError(f"{path}: the file is empty; download or copy it again")
        if head[8:9] == b"{":  # eight bytes of length, then JSON
            return read_dawhisper(path)
        return _read_openai(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({one_line(e)})") from e


def _read_openai(path: Path) -> Stored:
    content = unpickled(path)
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path}: not a Whisper checkpoint (it has no 'dims' and 'model_state_dict'); for a Hugging Face model "
            "name its folder, with config.json"
        )
    dims = checked_dims(path, content["dims"])
    if dims.n_vocab > 51866 or (dims.n_vocab == 51866 and dims.n_mels == 80):  # 128 channels came with that size
        raise CheckpointError(
            f"{path}: a vocabulary of {dims.n_vocab} tokens, and nothing says which of them are Whisper's; name the "
            "Hugging Face folder that it was made from"
        )
    return Stored(str(path), dims, checked_tensors(path, content["model_state_dict"]))


def _read_adapter(folder: Path, root: str | os.PathLike[str] | None) -> Stored:
    """An adapter, merged into the model that it was trained on."""
    config = read_json(folder / ADAPTER)
    base = str(config.get("base_model_name_or_path"))
    path = _base_at_hand(folder, base, root)
    if path is None:
        name = base.split("/")[-1].removeprefix("whisper-")
        hint = f"or put {base} into a folder of that name"
        if name in _model_table():
            hint = f"or get {base} with dawhisper.load_model({name!r}), then name the adapter again"
        raise CheckpointError(f"{folder}: it is an adapter: merge it into its model first with peft, {hint}")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no {files[0].name} in this folder; get the adapter again")
    adapter = checked_tensors(file, dict(tensors_of(file)))
    stored = _read(path, root)
    weights = merged(str(folder), config, adapter, stored.tensors, openai_name)
    return dataclasses.replace(stored, source=str(folder), tensors=weights)


def _base_at_hand(folder: Path, base: str, root: str | os.PathLike[str] | None) -> Path | None:
    """Where an adapter's base is: a path, as seen from here or from the adapter, or in a cache of downloads."""
    for place in (Path(base).expanduser(), folder / base, folder.parent / base):
        if place.exists() and place.resolve() != folder.resolve():
            return place
    name = base.split("/")[-1].removeprefix("whisper-")
    if name in _model_table() and (file := _cache(root) / _model_table()[name].split("/")[-1]).is_file():
        return file
    hub = Path(os.getenv("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    snapshots = sorted((hub / f"models--{base.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return snapshots[-1].parent if snapshots else None


# ---- tensors <-> model


def _build(stored: Stored, device: torch.device, dtype: torch.dtype) -> Whisper:
    """A model whose weights are the stored ones; every name and shape must fit."""
    with _Unfilled():
        model = Whisper(stored.dims, stored.dual, stored.variable_audio_ctx)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check(stored, expected)
    weights = {}
    for name in expected:
        scale = stored.tensors.get(name + SCALE_SUFFIX)
        weights[name] = unpacked(stored.tensors.pop(name), scale, device, dtype)
    model.load_state_dict(weights, assign=True)
    model.knows_silence = stored.knows_silence
    # without pairs the model's own default stays
    heads = _heads(stored, stored.alignment_heads) if stored.alignment_heads else model.alignment_heads
    model.alignment_heads = heads.to(device)
    return model


class _Unfilled(TorchFunctionMode):
    """Makes the weights of new modules without memory (meta device) and without their random start.

    As `torch.device("meta")` does for every tensor; that one, though, has torch import 860 modules (1 s, 110 MB).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (torch.empty, torch.randn):
            return torch.empty(*args, **{**kwargs, "device": "meta"})
        return func(*args, **kwargs)


def _check(stored: Stored, expected: Mapping[str, torch.Size]) -> None:
    given = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(SCALE_SUFFIX)}
    wrong = [
        f"{name} {list(given[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    odd = [
        f"{name} {tensor.dtype}"
        for name, tensor in given.items()
        if name in expected and not tensor.is_floating_point() and name + SCALE_SUFFIX not in stored.tensors
    ]
    odd += [
        name
        for name, tensor in stored.tensors.items()
        if name.endswith(SCALE_SUFFIX)
        and (name[: -len(SCALE_SUFFIX)] not in given or len(tensor) != len(given[name[: -len(SCALE_SUFFIX)]]))
    ]
    problems = (
        _few("missing", [name for name in expected if name not in given]),
        _few("unexpected", [name for name in given if name not in expected]),
        _few("of another shape", wrong),
        _few("of a wrong type", odd),
    )
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{stored.source}: the weights do not fit the model's dimensions: {found}")


def _few(what: str, names: list[str]) -> str:
    """'2 missing: a, b' ; of many, three are named and the rest counted."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what}: {', '.join(names[:3])}{more}"


def _heads(stored: Stored, pairs: Iterable[tuple[int, int]]) -> Tensor:
    """Alignment heads [n_text_layer, n_text_head] from their pairs."""
    heads = torch.zeros(stored.dims.n_text_layer, stored.dims.n_text_head, dtype=torch.bool)
    for layer, head in pairs:
        if not (0 <= layer < len(heads) and 0 <= head < heads.shape[1]):
            raise CheckpointError(f"{stored.source}: alignment head ({layer}, {head}) does not exist in this model")
        heads[layer, head] = True
    return heads


def set_alignment_heads(model: Whisper, dump: bytes) -> None:
    """Heads for word times from openai-whisper's table (base85 of gzipped booleans, layers by heads)."""
    flags = torch.frombuffer(bytearray(gzip.decompress(base64.b85decode(dump))), dtype=torch.bool)
    model.alignment_heads = flags.view(model.dims.n_text_layer, model.dims.n_text_head).to(model.device)
