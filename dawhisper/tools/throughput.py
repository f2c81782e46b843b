"""How fast a model decodes: encoder, prefill and token step, and their share of what the device can do.

The number of tokens is forced, so that neither the weights nor the audio matter. What the device can do is measured:
a matrix product gives its arithmetic, a copy its memory's bandwidth. What a step must read at least: the decoder's
weights, the logits' matrix, and the keys and values of each row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from dawhisper.decoding import DecodingOptions, decode_windows, model_tokenizer
from dawhisper.fast.cache import keeps_int8
from dawhisper.fast.int8 import is_quantized
from dawhisper.model import DualOptions, ModelDimensions, Whisper
from dawhisper.training.flops import forward_flops

SIZES = {
    "tiny": ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4),
    "base": ModelDimensions(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6),
    "small": ModelDimensions(80, 1500, 768, 12, 12, 51865, 448, 768, 12, 12),
    "medium": ModelDimensions(80, 1500, 1024, 16, 24, 51865, 448, 1024, 16, 24),
    "large-v3": ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 32),
    "turbo": ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 4),
}


@dataclass(frozen=True)
class Throughput:
    """The stages of decoding a batch of 30 s windows, `tokens` each; times in milliseconds for the whole batch.

    encoder_share, step_share: of the device's arithmetic and of its bandwidth, both measured; the latter is None with
    weights in int8, which are packed and don't tell their size.
    """

    windows: int
    tokens: int
    encode_ms: float
    prefill_ms: float  # cross-attention keys and values, the prompt, the first token
    step_ms: float  # each further token
    encoder_share: float
    step_share: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of decoding encoded windows."""
        return 1e3 * self.windows * self.tokens / (self.prefill_ms + (self.tokens - 1) * self.step_ms)

    @property
    def tokens_per_second_with_encoder(self) -> float:
        whole = self.encode_ms + self.prefill_ms + (self.tokens - 1) * self.step_ms
        return 1e3 * self.windows * self.tokens / whole


def random_model(size: str, dual: DualOptions | None, device: str, dtype: torch.dtype) -> Whisper:
    """A model of a known size with random weights."""
    with torch.device(device):
        return Whisper(SIZES[size], dual).to(dtype).eval()


def fastest(run: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    """Seconds of the fastest of some rounds, after one that does not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MB."""
    source = torch.ones(64_000_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / fastest(lambda: target.copy_(source), device)


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / fastest(lambda: a @ a, device)


@torch.no_grad()
def measure(model: Whisper, windows: int, tokens: int = 128, rounds: int = 3) -> Throughput:
    """Decode a batch of 30 s windows greedily, `tokens` each."""
    dims, device = model.dims, model.device
    mel = torch.randn(windows, dims.n_mels, 2 * dims.n_audio_ctx, device=device, dtype=model.dtype)
    encode = fastest(lambda: model.encode(mel), device, rounds)
    features = model.encode(mel)
    forced = DecodingOptions(language="en", without_timestamps=True, suppress_tokens=[model_tokenizer(model).eot])

    def decode(n: int) -> float:
        options = replace(forced, sample_len=n)
        assert len(decode_windows(model, features, options)[0].tokens) == n
        return fastest(lambda: decode_windows(model, features, options), device, rounds)

    whole, prefill = decode(tokens), decode(1)
    step = (whole - prefill) / (tokens - 1)
    flops = windows * forward_flops(replace(dims, n_text_layer=0), None, dims.n_audio_ctx, 0)
    read = None if is_quantized(model) else step_bytes(model, windows, tokens // 2)
    return Throughput(
        windows=windows,
        tokens=tokens,
        encode_ms=1e3 * encode,
        prefill_ms=1e3 * prefill,
        step_ms=1e3 * step,
        encoder_share=flops / encode / matmul_flops(device, encoder_type(model)),
        step_share=None if read is None else read / step / copy_bandwidth(device),
    )


def encoder_type(model: Whisper) -> torch.dtype:
    """The type that the encoder's products are computed in; fp32 where they are in int8."""
    return next((p.dtype for p in model.encoder.blocks.parameters() if p.ndim == 2), torch.float32)


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
