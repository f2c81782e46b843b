"""How fast a model decodes: encoder, prefill and token step, and their share of what the device can do.

The number of tokens is forced, so that the weights don't matter and random ones serve. What a step must read at least:
the decoder's weights, the logits' matrix, and the keys and values of each row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch

from dawhisper.decoding import DecodingOptions, decode_windows, model_tokenizer
from dawhisper.fast.cache import keeps_int8
from dawhisper.model import DualOptions, ModelDimensions, Whisper
from dawhisper.training.flops import forward_flops

from .bench import matmul_flops

SIZES = {
    "tiny": ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4),
    "base": ModelDimensions(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6),
    "small": ModelDimensions(80, 1500, 768, 12, 12, 51865, 448, 768, 12, 12),
    "medium": ModelDimensions(80, 1500, 1024, 16, 24, 51865, 448, 1024, 16, 24),
    "large-v3": ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 32),
    "turbo": ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 4),
}
BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes a second, by data sheet


@dataclass(frozen=True)
class Throughput:
    """Times in milliseconds for the whole batch; shares of the device's peak, None where that is not known."""

    batch: int
    tokens: int
    encoder_ms: float
    prefill_ms: float  # cross-attention keys and values, the prompt, the first token
    step_ms: float  # each further token
    encoder_share: float | None  # of the rate of `matrix_rate`; of a GPU
    step_share: float | None  # of the memory's bandwidth

    @property
    def tokens_per_second(self) -> float:
        """Of decoding encoded windows."""
        return 1e3 * self.batch * self.tokens / (self.prefill_ms + (self.tokens - 1) * self.step_ms)

    @property
    def tokens_per_second_with_encoder(self) -> float:
        return self.batch * self.tokens / (self.batch * self.tokens / self.tokens_per_second + self.encoder_ms / 1e3)


def random_model(size: str, dual: DualOptions | None, device: str, dtype: torch.dtype) -> Whisper:
    """A model of a known size with random weights."""
    with torch.device(device):
        return Whisper(SIZES[size], dual).to(dtype).eval()


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of a run, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return 1e3 * median(times)


@cache
def matrix_rate(device: torch.device) -> float:
    """FLOP/s that the device reaches in a bf16 matrix product."""
    return matmul_flops(device, torch.bfloat16)


@torch.no_grad()
def measure(model: Whisper, batch: int, tokens: int = 128, repeats: int = 3) -> Throughput:
    """Decode a batch of 30 s windows greedily, `tokens` each."""
    dims, device = model.dims, model.device
    mel = torch.randn(batch, dims.n_mels, 2 * dims.n_audio_ctx, device=device, dtype=model.dtype)
    encoder_ms = milliseconds(lambda: model.encode(mel), device, repeats)
    features = model.encode(mel)
    forced = DecodingOptions(language="en", without_timestamps=True, suppress_tokens=[model_tokenizer(model).eot])

    def decode_ms(n: int) -> float:
        options = replace(forced, sample_len=n)
        assert len(decode_windows(model, features, options)[0].tokens) == n
        return milliseconds(lambda: decode_windows(model, features, options), device, repeats)

    whole, prefill_ms = decode_ms(tokens), decode_ms(1)
    step_ms = (whole - prefill_ms) / (tokens - 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    bandwidth = next((b for part, b in BANDWIDTH.items() if part in name), None)
    encoder_flops = batch * forward_flops(replace(dims, n_text_layer=0), None, dims.n_audio_ctx, 0)
    return Throughput(
        batch,
        tokens,
        encoder_ms,
        prefill_ms,
        step_ms,
        encoder_flops / (encoder_ms / 1e3) / matrix_rate(device) if device.type == "cuda" else None,
        step_bytes(model, batch, tokens // 2) / (step_ms / 1e3) / bandwidth if bandwidth else None,
    )


def step_bytes(model: Whisper, rows: int, position: int) -> int:
    """The least that a token step reads at this position, with one row a window."""
    dims = model.dims
    unread = ("positional_embedding", "attn.key.", "attn.value.", "noise_embed")
    weights = sum(
        p.numel()
        for name, p in model.decoder.named_parameters()
        # keys and values of the audio are computed once a window
        if not any(part in name for part in unread) or name.split(".")[2:3] == ["attn"]
    )
    branches = 1 if model.dual is None else 2
    size = model.decoder.positional_embedding.element_size()
    audio = branches * dims.n_audio_ctx * (1 if keeps_int8(model.decoder) else size)
    cached = 2 * dims.n_text_layer * dims.n_text_state * (audio + position * size)
    return weights * size + rows * cached
