"""Tokens per second with random weights: dual, single-branch, and Hugging Face transformers in the same run.

    python benchmarks/decode_throughput.py
    python benchmarks/decode_throughput.py --who dual single --compile
    python benchmarks/decode_throughput.py --device cpu --dtype fp32 --sizes tiny --batches 1 2 --tokens 8

Greedy, 30 s windows, the number of tokens forced. Rows are printed as they are measured.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass

import torch

from dawhisper.decoding import model_tokenizer
from dawhisper.device import DTYPES
from dawhisper.errors import one_line
from dawhisper.formats.huggingface import hide_broken_torchaudio, transformers_config
from dawhisper.model import DualOptions
from dawhisper.tools.throughput import SIZES, fastest, matmul_flops, measure, random_model

WHO = ("dual", "single", "hf")
COLUMNS = (
    "size | batch | who | encoder ms | prefill ms | ms/step | tok/s | tok/s with encoder | "
    "encoder, share of a matrix product's rate | step, share of a copy's bandwidth | seconds taken"
)


@dataclass(frozen=True)
class Row:
    """One line of the table; what a peer can't tell apart stays empty."""

    size: str
    batch: int
    who: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return "| " + " | ".join((self.size, str(self.batch), self.who, *self.cells)) + " |"


def ours(size: str, batch: int, who: str, args: argparse.Namespace) -> tuple[str, ...]:
    model = random_model(size, DualOptions() if who == "dual" else None, args.device, DTYPES[args.dtype])
    model.decoder.int8_memory = args.int8_memory
    if args.compile:
        torch._dynamo.reset()  # so that every row is compiled for its own shapes
        model.compile_blocks()
    m = measure(model, batch, args.tokens, args.repeats)
    shares = ("" if share is None else f"{share:.0%}" for share in (m.encoder_share, m.step_share))
    rates = (f"{m.tokens_per_second:.0f}", f"{m.tokens_per_second_with_encoder:.0f}")
    return (f"{m.encode_ms:.1f}", f"{m.prefill_ms:.1f}", f"{m.step_ms:.3f}", *rates, *shares)


@torch.no_grad()
def transformers(size: str, batch: int, who: str, args: argparse.Namespace) -> tuple[str, ...]:
    hide_broken_torchaudio()
    from transformers import GenerationMixin, WhisperForConditionalGeneration

    dims = SIZES[size]
    config = transformers_config(dims, attn_implementation="sdpa")
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    with device:
        model = WhisperForConditionalGeneration(config).to(dtype).eval()
    mel = torch.randn(batch, dims.n_mels, 3000, device=device, dtype=dtype)
    tokenizer = model_tokenizer(random_model("tiny", None, "cpu", torch.float32), "en", "transcribe")
    first = torch.tensor([tokenizer.sot_sequence_including_notimestamps], device=device).expand(batch, -1)

    def generate(n: int) -> torch.Tensor:
        length = {"min_new_tokens": n, "max_new_tokens": n}
        # Whisper's own generate is for long audio with timestamps; this is what it calls for each window
        return GenerationMixin.generate(model, mel, decoder_input_ids=first, do_sample=False, num_beams=1, **length)

    assert generate(args.tokens).shape[1] == first.shape[1] + args.tokens
    encoder = 1e3 * fastest(lambda: model.get_encoder()(mel), device, args.repeats)
    whole = 1e3 * fastest(lambda: generate(args.tokens), device, 1)  # after two that don't count
    prefill = 1e3 * fastest(lambda: generate(1), device, args.repeats) - encoder
    n = 1e3 * batch * args.tokens
    step = (whole - encoder - prefill) / (args.tokens - 1)
    rates = (f"{n / (whole - encoder):.0f}", f"{n / whole:.0f}")
    return (f"{encoder:.1f}", f"{prefill:.1f}", f"{step:.3f}", *rates, "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--sizes", nargs="+", default=["base", "turbo", "large-v3"], choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 32])
    parser.add_argument("--who", nargs="+", default=WHO, choices=WHO)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="our encoder with torch.compile")
    parser.add_argument("--int8-memory", action="store_true", help="keys and values of the audio in int8; ours")
    parser.add_argument("--no-cudnn", action="store_true", help="attention by PyTorch's own kernels alone")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)

    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {args.dtype}, {args.tokens} tokens a window", end="")
    print(", our encoder compiled" * args.compile + ", our keys and values in int8" * args.int8_memory, end="")
    print(f", matrix products {matmul_flops(torch.device(args.device), DTYPES[args.dtype]) / 1e12:.1f} TFLOP/s\n")
    print(f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}", flush=True)
    for size in args.sizes:
        for batch in args.batches:
            for who in args.who:
                started = time.perf_counter()
                try:
                    cells = (transformers if who == "hf" else ours)(size, batch, who, args)
                except Exception as error:  # a peer that fails or lacks memory must not end the run
                    cells = (one_line(f"{type(error).__name__}: {error}"), *[""] * 6)
                print(Row(size, batch, who, (*cells, f"{time.perf_counter() - started:.0f}")), flush=True)
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
