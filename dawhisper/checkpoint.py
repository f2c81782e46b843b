"""Names, files and folders -> model, and back.

Three kinds of checkpoint are read, told apart by their content: OpenAI's .pt, a Hugging Face Whisper folder, and
dawhisper's own safetensors file, whose metadata holds the configuration as JSON. Reading never runs code from a file.
Tensors go one by one into a model that has no memory of its own, so weights are never held twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import pickle
import re
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dawhisper.fast.int8 import quantize
from dawhisper.formats.adapter import merged
from dawhisper.formats.foreign import foreign_format
from dawhisper.formats.vocabulary import whisper_rows

from .errors import CheckpointError, OptionError
from .files import replacing
from .model import DualOptions, ModelDimensions, Whisper

FORMAT_VERSION = 1
OWN_MODEL = "dawhisper-base"  # Whisper base with a second branch, trained for noise
METADATA_KEY = "dawhisper"  # the safetensors metadata entry that holds the configuration
SCALE_SUFFIX = ":scale"  # fp16 scales [rows] of the int8 tensor of the same name
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
ADAPTER = "adapter_config.json"
EMBEDDING = "decoder.token_embedding.weight"
HF_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
HF_PARTS = {  # parts of a Hugging Face parameter name -> openai-whisper's
    "layers": "blocks",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
}
HF_NAMES = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}


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
    dtype: "fp32", "fp16", "bf16" or a torch dtype of the weights; None = fp16 on cuda, fp32 elsewhere. "int8", for
        x86 CPUs, has linear layers in int8 and the rest in fp32: the fastest there, for inference alone
    download_root: folder for downloads; None = openai-whisper's cache, ~/.cache/whisper
    dual: give a stock model a second branch with these options (with init="copy" it computes the same as before)

    As in openai-whisper, a model loaded by its name knows which heads word times are best read from; for an OpenAI
    file named by its path they are all heads of the upper half of the decoder.

    Raises
    ------
    CheckpointError: the model cannot be found, read or used; OptionError: unknown device or dtype
    """
    chosen = _device(device)
    if dtype == "int8" and chosen.type != "cpu":
        raise OptionError(f"int8 is for the CPU, not {chosen}; use device='cpu', or fp16")
    kind = _dtype("fp32" if dtype == "int8" else dtype, chosen)
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
    model = _build(stored, chosen, kind)
    if heads is not None:
        model.set_alignment_heads(heads)
    if dual is not None and model.dual is None:
        model.add_second_branch(dual)
    elif dual is not None and model.dual != dual:
        raise CheckpointError(f"{path}: this model has a second branch already ({model.dual}); leave `dual` out")
    return quantize(model.eval()) if dtype == "int8" else model.eval()


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
    if model.decoder.output is not None:
        raise OptionError("a model loaded with dtype='int8' can't be saved; load it as fp32")
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
        tensors.update(_packed(name, tensor.detach().to("cpu", torch.float32), dtype))
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(config)})
            part.chmod(0o644)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{target}: cannot be written ({_line(e)}); choose another folder or free some space"
        ) from e


def read_config(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration in a dawhisper file: dims, dual, base_model, recipe, storage ..., without its weights."""
    path = _existing(os.fspath(name_or_path))
    with _safetensors(path) as file:
        return _config(path, file.metadata())


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
        reason = _line(getattr(e, "reason", None) or e)
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
        if path.is_dir() and (path / ADAPTER).is_file() and _weights_of(path) is None:
            return _read_adapter(path, root)
        if path.is_dir():
            return _read_hf(path)
        with path.open("rb") as file:
            head = file.read(9)
        if other := foreign_format(path):
            raise CheckpointError(f"{path}: {_foreign(other)}")
        if not head:
            raise CheckpointError(f"{path}: the file is empty; download or copy it again")
        if head[8:9] == b"{":  # eight bytes of length, then JSON
            return _read_dawhisper(path)
        return _read_openai(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({_line(e)})") from e


def _read_openai(path: Path) -> Stored:
    content = _unpickled(path)
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path}: not a Whisper checkpoint (it has no 'dims' and 'model_state_dict'); for a Hugging Face model "
            "name its folder, with config.json"
        )
    dims = _dims(path, content["dims"])
    if dims.n_vocab > 51866 or (dims.n_vocab == 51866 and dims.n_mels == 80):  # 128 channels came with that size
        raise CheckpointError(
            f"{path}: a vocabulary of {dims.n_vocab} tokens, and nothing says which of them are Whisper's; name the "
            "Hugging Face folder that it was made from"
        )
    return Stored(str(path), dims, _tensors(path, content["model_state_dict"]))


def _read_dawhisper(path: Path) -> Stored:
    with _safetensors(path) as file:
        config = _config(path, file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        dual = None if config["dual"] is None else DualOptions(**config["dual"])
        heads = tuple((int(layer), int(head)) for layer, head in config["alignment_heads"])
        variable, silence = bool(config["variable_audio_ctx"]), bool(config.get("knows_silence"))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its configuration is damaged ({_line(e)}); save the model again") from e
    return Stored(str(path), _dims(path, config.get("dims")), packed, dual, variable, silence, heads)


def _read_hf(folder: Path) -> Stored:
    if _weights_of(folder) is None:
        if newest := _newest_checkpoint(folder):
            raise CheckpointError(f"{folder}: a Trainer's folder; name its newest checkpoint, {newest}, as the model")
        if other := foreign_format(folder):
            raise CheckpointError(f"{folder}: {_foreign(other)}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in this folder; name a Hugging Face Whisper folder or a file")
    config = _json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{folder}: a model of type {config.get('model_type')!r}; only Whisper models can be used"
        )
    try:
        dims = ModelDimensions(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_audio_state=config["d_model"],
            n_audio_head=config["encoder_attention_heads"],
            n_audio_layer=config["encoder_layers"],
            n_vocab=config["vocab_size"],
            n_text_ctx=config["max_target_positions"],
            n_text_state=config["d_model"],
            n_text_head=config["decoder_attention_heads"],
            n_text_layer=config["decoder_layers"],
        )
    except KeyError as e:
        raise CheckpointError(f"{folder / 'config.json'}: it lacks {_line(e)}; download the folder again") from e
    generation = folder / "generation_config.json"
    heads = _json(generation).get("alignment_heads") if generation.is_file() else None
    tensors = _tensors(folder, {_openai_name(name): tensor for name, tensor in _hf_tensors(folder)})
    output = tensors.pop("proj_out.weight", None)
    embedding = tensors.setdefault(EMBEDDING, output) if output is not None else tensors.get(EMBEDDING)
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise CheckpointError(
            f"{folder}: its output layer differs from its token embedding, which no Whisper model has"
        )
    checked = _dims(folder, dataclasses.asdict(dims))
    rows = whisper_rows(folder, config)
    if embedding is not None and rows < len(embedding) == checked.n_vocab:
        warnings.warn(f"{folder}: {checked.n_vocab - rows} tokens that are not Whisper's are left out", stacklevel=4)
        tensors[EMBEDDING] = embedding[:rows]
        checked = dataclasses.replace(checked, n_vocab=rows)
    return Stored(str(folder), checked, tensors, alignment_heads=_pairs(folder, heads))


def _read_adapter(folder: Path, root: str | os.PathLike[str] | None) -> Stored:
    """An adapter, merged into the model that it was trained on."""
    config = _json(folder / ADAPTER)
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
    adapter = _tensors(file, dict(_tensors_of(file)))
    stored = _read(path, root)
    weights = merged(str(folder), config, adapter, stored.tensors, _openai_name)
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


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last of the checkpoints that a Trainer wrote into a folder."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()]
    return max(found, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _foreign(name: str) -> str:
    return f"a model in the format of {name}, which dawhisper does not read; name the model that it was made from"


def _weights_of(folder: Path) -> Path | None:
    return next((folder / name for name in HF_WEIGHTS if (folder / name).is_file()), None)


def _hf_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder: one file or several, safetensors or pickled."""
    found = _weights_of(folder)
    if found is None:
        adapter = any(folder.glob("adapter_*"))
        hint = (
            "it is an adapter: merge it into its model first" if adapter else f"it needs one of {', '.join(HF_WEIGHTS)}"
        )
        raise CheckpointError(f"{folder}: no weights in this folder; {hint}")
    files = [found]
    if found.suffix == ".json":
        weight_map = _json(found).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{found}: no weight_map in it; download the folder again")
        files = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this part of the model is missing; download the folder again")
        yield from _tensors_of(file)


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with _safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
        return
    content = _unpickled(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: it holds no tensors; download the folder again")
    yield from content.items()


def _openai_name(name: str) -> str:
    name = str(name).removeprefix("model.")
    return HF_NAMES.get(name) or ".".join(HF_PARTS.get(part, part) for part in name.split("."))


def _unpickled(path: Path) -> Any:
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
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({_line(e)}); download or copy it again") from e


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: the file is cut off or damaged ({_line(e)}); download or copy it again") from e


def _config(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: no dawhisper configuration in it; for a Hugging Face model name its folder, with config.json"
        )
    try:
        config = json.loads(text)
        version = int(config["format_version"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its configuration is damaged ({_line(e)}); save the model again") from e
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: written in format {version} by a newer dawhisper; update dawhisper to read it")
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({_line(e)}); download it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    return content


def _dims(source: Path, values: Any) -> ModelDimensions:
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


def _tensors(source: Path, values: Any) -> dict[str, Tensor]:
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{source}: its weights are not a plain table of tensors")
    return {str(name): tensor for name, tensor in values.items()}


def _pairs(source: Path, heads: Any) -> tuple[tuple[int, int], ...] | None:
    if heads is None:
        return None
    try:
        return tuple((int(layer), int(head)) for layer, head in heads)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{source}: alignment_heads is not a list of [layer, head] pairs") from e


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
        weights[name] = _unpacked(stored.tensors.pop(name), scale, device, dtype)
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


def _packed(name: str, tensor: Tensor, dtype: str) -> Iterable[tuple[str, Tensor]]:
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


def _unpacked(tensor: Tensor, scale: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return tensor.to(device, dtype, copy=True)  # a copy, because the tensor may be a view of the file
    rows = tensor.to(device).flatten(1).float() * scale.to(device).float()[:, None]
    return rows.view(tensor.shape).to(dtype)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise OptionError(f"unknown device {device!r}; use cuda, cuda:1, mps or cpu") from e
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device}: torch finds {torch.cuda.device_count()} cuda devices here; use cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("device mps: torch finds none here; use cpu")
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise OptionError(f"unknown dtype {dtype!r}; use fp32, fp16, bf16, or int8 on a CPU")
    assert found is not None
    return found


def _line(error: object) -> str:
    """An error's text as one short line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
