"""Graphs that `dawhisper export` made, run by onnxruntime on the CPU (tools/export.py says what is in them)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dawhisper.errors import CheckpointError, OptionError, one_line
from dawhisper.model import AudioFeatures, CrossMemory, DualOptions, ModelDimensions, Whisper
from dawhisper.trace import Trace

CONFIG = "config.json"
FORMAT_VERSION = 1


def cross_names(n_layer: int) -> list[str]:
    return [f"cross_{what}_{layer}" for layer in range(n_layer) for what in ("key", "value")]


def load_onnx(folder: Path) -> Whisper:
    """A Whisper that runs the graphs of an exported folder on onnxruntime, on the CPU. CheckpointError if it can't."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        dims = ModelDimensions(**config["dims"])
        dual = None if config["dual"] is None else DualOptions(**config["dual"])
        dtype = torch.float16 if config["dtype"] == "fp16" else torch.float32
        variable, silence = bool(config["variable_audio_ctx"]), bool(config.get("knows_silence"))
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{folder / CONFIG}: not that of an exported model; export the model again") from e
    with torch.device("meta"):
        model = Whisper(dims, dual, variable)
    model.encoder = OnnxEncoder(_session(folder / "encoder.onnx"))  # type: ignore[assignment]
    model.decoder = OnnxDecoder(_session(folder / "decoder.onnx"), dims, dtype)  # type: ignore[assignment]
    model.knows_silence = silence
    model.alignment_heads = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)  # no attention to read
    return model.eval()


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise OptionError("ONNX models need onnxruntime: pip install 'dawhisper[export]'") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors have no class in common
        raise CheckpointError(f"{path}: cannot be loaded ({one_line(e)}); export it again") from e


class OnnxEncoder(nn.Module):
    """Stands in for AudioEncoder: mel -> AudioFeatures that hold keys and values, [B, L, H, T, e] each."""

    hears_twice = False  # the graph takes one spectrogram

    def __init__(self, session: Any):
        super().__init__()
        self.session = session

    def forward(self, mel: Tensor) -> AudioFeatures:
        cross = [torch.from_numpy(x) for x in self.session.run(None, {"mel": mel.contiguous().numpy()})]
        return AudioFeatures(torch.stack(cross[::2], dim=1), torch.stack(cross[1::2], dim=1))


class OnnxDecoder(nn.Module):
    """Stands in for TextDecoder, for a KVCache of OnnxEncoder's features."""

    positional_embedding: Tensor

    def __init__(self, session: Any, dims: ModelDimensions, dtype: torch.dtype):
        super().__init__()
        self.session = session
        # the cache and the model ask it for sizes and type alone
        self.register_buffer("positional_embedding", torch.empty(dims.n_text_ctx, dims.n_text_state, dtype=dtype))

    def memories(self, features: AudioFeatures) -> Iterator[CrossMemory]:
        for layer in range(features.primary.shape[1]):
            yield CrossMemory(features.primary[:, layer], features.secondary[:, layer], None, None)

    def remember(self, features: AudioFeatures) -> list[CrossMemory]:
        return list(self.memories(features))

    def forward(
        self,
        tokens: Tensor,
        features: AudioFeatures | None = None,
        cache: Any = None,
        trace: Trace | None = None,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """As TextDecoder's, with a cache always and never a trace: OptionError where attention is asked for."""
        if trace is not None or cache is None:
            raise OptionError("an exported model does not tell its attention: for word times use the model it is from")
        windows = cache.memories[0].key.shape[0]
        past = cache.states[..., : cache.length, :].unflatten(2, (windows, -1)).contiguous()
        cross = [x for memory in cache.memories for x in (memory.key, memory.value)]
        inputs = [tokens.unflatten(0, (windows, -1)).contiguous(), past, *cross]
        names = ["tokens", "past", *cross_names(len(cache.memories))]
        logits, new = (
            torch.from_numpy(x).flatten(i, i + 1)
            for i, x in zip((0, 2), self.session.run(None, {k: x.numpy() for k, x in zip(names, inputs)}))
        )
        end = cache.length + tokens.shape[1]
        cache.states[..., cache.length : end, :] = new
        cache.length = end
        return logits if positions is None else logits[:, list(positions)]
