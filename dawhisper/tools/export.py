"""A model as graphs for other runtimes: `encoder` and `decoder`, as ONNX or by torch.export, and a runner for ONNX.

encoder: mel [B, n_mels, 2T] -> cross_key_i, cross_value_i [B, H, T, e] of each decoder layer i; H is h, or 2h for dual
models, whose branches' heads are stacked. The keys and values are computed once for a window.
decoder: tokens [B, G, n], past [L, 2, B, G, h, P, e] and all of the above -> logits [B, G, n, V] in float32, and new
[L, 2, B, G, h, n, e], to be appended to past along P. G rows (beams or samples) share a window's audio; n and P are
free, so one graph reads the prompt (P = 0) and takes the steps (n = 1).

B, G, n, P and T are dynamic. `load_onnx` puts the graphs where a Whisper has its encoder and decoder: all of decoding
and transcription then runs on them, except word times, which need the attention itself.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dawhisper.audio import load_audio, log_mel_spectrogram, pad_or_trim
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL, load_model
from dawhisper.decoding import DecodingOptions, decode_windows
from dawhisper.errors import OptionError
from dawhisper.files import writable_folder
from dawhisper.formats.dawhisper import quantize_rows
from dawhisper.formats.onnx import CONFIG, FORMAT_VERSION, cross_names, load_onnx
from dawhisper.model import CrossMemory, Whisper, merge
from dawhisper.options import option

EXPORT_FORMATS = ("onnx", "torch")
EXPORT_DTYPES = ("fp32", "fp16", "int8")
OPSET = 23  # the first with attention as one operator
LARGE = 1_500_000_000  # bytes of weights beyond which they go beside the .onnx, which can't hold 2 GiB


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    out: folder for encoder and decoder (.onnx or .pt2) and config.json. dtype: fp32, fp16, or for ONNX int8: weights
    of the matrix products as int8, one scale for 32 of them, activations quantised as they come.
    check: recordings on which the exported graphs must give the tokens of the PyTorch model (ONNX only).
    """

    out: str = option(help="folder for the graphs and config.json", metavar="DIR")
    model: str = option(OWN_MODEL, MODEL_HELP)
    format: str = option("onnx", "of the graphs", choices=EXPORT_FORMATS)
    dtype: str = option("fp32", "of the weights; int8 for ONNX only", choices=EXPORT_DTYPES)
    check: Sequence[str] = option((), "recordings to compare the tokens with PyTorch's on", metavar="FILE")

    def __post_init__(self) -> None:
        for name, known in (("format", EXPORT_FORMATS), ("dtype", EXPORT_DTYPES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.format == "torch" and (self.dtype == "int8" or self.check):
            raise OptionError("int8 and check are for --format onnx")


def export_files(options: ExportOptions) -> str:
    """Export, check, and tell in a few lines what is there. DawhisperError for what can't be exported."""
    out = Path(options.out)
    writable_folder(out)
    model = load_model(options.model, device="cpu", dtype="fp32")
    export(model, out, options.format, options.dtype)
    written = sorted(path for path in out.iterdir() if path.stem.split(".")[0] in ("encoder", "decoder", "config"))
    lines = [f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in written]
    if options.check:
        lines.append(check(model, load_onnx(out), options.check))
    return "\n".join(lines)


def export(model: Whisper, out: Path, format: str = "onnx", dtype: str = "fp32") -> None:
    """Write encoder and decoder into the folder. OptionError where a package for it is missing."""
    if format == "onnx":
        check_packages()
    made = _copy(model, torch.float16 if dtype == "fp16" else torch.float32)
    for name, program in programs(made, dtype == "int8").items():
        if format == "torch":
            torch.export.save(program, out / f"{name}.pt2")
        else:
            write_onnx(program, out / f"{name}.onnx", dtype == "int8")
    config = {
        "format_version": FORMAT_VERSION,
        "dims": asdict(model.dims),
        "dual": None if model.dual is None else asdict(model.dual),
        "variable_audio_ctx": model.variable_audio_ctx,
        "knows_silence": model.knows_silence,
        "dtype": dtype,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _copy(model: Whisper, dtype: torch.dtype) -> Whisper:
    """The same weights as plain tensors on the CPU, without gradients."""
    made = Whisper(model.dims, model.dual, model.variable_audio_ctx)
    made.load_state_dict(model.state_dict())
    return made.to("cpu", dtype).eval().requires_grad_(False)


# ---- graphs -------------------------------------------------------------------------------------------------------


class EncoderGraph(nn.Module):
    """mel -> keys and values of every decoder layer's cross-attentions."""

    def __init__(self, model: Whisper):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, mel: Tensor) -> list[Tensor]:
        memories = self.decoder.memories(self.encoder(mel))
        return [x for memory in (m.stacked() for m in memories) for x in (memory.key, memory.value)]


class Int8Embedding(nn.Module):
    """Token embedding with a scale for each row; onnxruntime's own quantisation has one scale for all of them."""

    def __init__(self, weight: Tensor):
        super().__init__()
        values, scale = quantize_rows(weight.float())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.float())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.values[tokens].float() * self.scale[tokens][..., None]  # type: ignore[index]


class DecoderGraph(nn.Module):
    """Tokens after those in `past` -> logits, and the new tokens' keys and values.

    int8: embedding and output layer, which are one tensor, are kept apart: each can then be quantised in its own way.
    """

    def __init__(self, model: Whisper, int8: bool = False):
        super().__init__()
        self.decoder = model.decoder
        weight = model.decoder.token_embedding.weight.detach()
        self.embedding = Int8Embedding(weight) if int8 else model.decoder.token_embedding
        self.output = nn.Parameter(weight.T.contiguous(), requires_grad=False) if int8 else None

    def forward(self, tokens: Tensor, past: Tensor, *cross: Tensor) -> tuple[Tensor, Tensor]:
        decoder = self.decoder
        groups = tokens.shape[:2]
        length, n = past.shape[-2], tokens.shape[2]
        position = torch.arange(length, length + n)
        seen = torch.arange(length + n)[None] <= position[:, None]
        x = self.embedding(tokens.flatten(0, 1)) + decoder.positional_embedding[position]
        new = []
        for layer, (block, states) in enumerate(zip(decoder.blocks, past.flatten(2, 3))):
            key, value = block.attn.key_value(block.attn_ln(x))  # type: ignore[operator, union-attr]
            new.append(torch.stack([key, value]))
            x = self._block(block, x, torch.cat([states, new[-1]], dim=3), seen, self._memory(layer, cross))
        output = decoder.token_embedding.weight.T if self.output is None else self.output
        logits = (decoder.ln(x) @ output).float()
        return logits.unflatten(0, groups), torch.stack(new).unflatten(2, groups)

    def _memory(self, layer: int, cross: Sequence[Tensor]) -> CrossMemory:
        embed, secondary = self.decoder.noise_embed, self.decoder.blocks[layer].secondary_attn
        noise = None if embed is None else secondary.key_value(embed[None])  # type: ignore[operator, union-attr]
        return CrossMemory(cross[2 * layer], cross[2 * layer + 1], None, noise)

    def _block(self, block: Any, x: Tensor, states: Tensor, seen: Tensor, memory: CrossMemory) -> Tensor:
        """DecoderBlock.forward with a cache that is passed in, and one mask for prompt and steps."""
        query = block.attn.split(block.attn.query(block.attn_ln(x)))
        read = F.scaled_dot_product_attention(query, states[0], states[1], attn_mask=seen)
        x = x + block.attn.out(merge(read))
        y = block.cross_attn_ln(x).view(memory.key.shape[0], -1, x.shape[-1])
        x = x + block.cross_attention(y, memory).output.view_as(x)
        return x + block.mlp(block.mlp_ln(x))


@torch.no_grad()
def programs(model: Whisper, int8: bool = False) -> dict[str, ExportedProgram]:
    """torch.export's programs of encoder and decoder, traced on small inputs with every size free.

    int8: made to be quantised by `write_onnx`.
    """
    dims, dtype = model.dims, model.dtype
    batch, group, n, past, half, positions = (
        Dim(name) for name in ("batch", "group", "n", "past", "half", "positions")
    )
    mel = torch.zeros(2, dims.n_mels, 8, dtype=dtype)
    cross = EncoderGraph(model)(mel)
    states = torch.zeros(
        *(dims.n_text_layer, 2, 2, 3, dims.n_text_head, 5, dims.n_text_state // dims.n_text_head), dtype=dtype
    )
    tokens = torch.zeros(2, 3, 4, dtype=torch.long)
    every = tuple({0: batch, 2: positions} for _ in cross)
    shapes = {"mel": {0: batch, 2: 2 * half}}
    encoder = torch.export.export(EncoderGraph(model), (mel,), dynamic_shapes=shapes, strict=False)
    decoder = torch.export.export(  # strict takes three times as long, and without it `batch` would not stay free
        DecoderGraph(model, int8),
        (tokens, states, *cross),
        dynamic_shapes={"tokens": {0: batch, 1: group, 2: n}, "past": {2: batch, 3: group, 5: past}, "cross": every},
        strict=True,
    )
    return {"encoder": encoder, "decoder": decoder}


# ---- ONNX ---------------------------------------------------------------------------------------------------------


def check_packages() -> None:
    """Raise for a package that ONNX needs, before tracing takes its time. Torch itself writes with onnxscript."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"ONNX needs {name}, which is not installed: pip install 'dawhisper[export]'")


def write_onnx(program: ExportedProgram, path: Path, int8: bool = False) -> None:
    """The program as an .onnx file, its weights beside it where they are large."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    n_layer = (len(program.graph_signature.user_inputs) - 2) // 2 or len(program.graph_signature.user_outputs) // 2
    names = {
        "encoder": (["mel"], cross_names(n_layer)),
        "decoder": (["tokens", "past", *cross_names(n_layer)], ["logits", "new"]),
    }
    inputs, outputs = names[path.stem]
    large = sum(x.numel() * x.element_size() for x in program.state_dict.values()) > LARGE
    with _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, verbose=False
        )
        assert made is not None
        whole = Path(folder) / path.name if int8 else path
        made.save(whole, external_data=large)
        if int8:
            # products in int8 too (level 4): in floating point the token step is four times slower than in fp32
            config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=8)
            quantizer = MatMulNBitsQuantizer(onnx.load(whole), algo_config=config)
            quantizer.process()
            quantizer.model.save_model_to_file(str(path), large)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter's parts remark to one another."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---- check --------------------------------------------------------------------------------------------------------


def check(model: Whisper, exported: Whisper, recordings: Sequence[str]) -> str:
    """How many recordings (their first 30 s, greedily) give the same tokens with both models."""
    same = sum(_tokens(model, path) == _tokens(exported, path) for path in recordings)
    return f"same tokens as PyTorch in fp32 on {same} of {len(recordings)} recordings"


def _tokens(model: Whisper, path: str) -> list[int]:
    mel = log_mel_spectrogram(pad_or_trim(load_audio(path)), model.dims.n_mels)
    with torch.no_grad():
        return decode_windows(model, model.encode(mel[None].to(model.dtype)), DecodingOptions())[0].tokens
