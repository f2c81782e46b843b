"""Training speed beside the peers, in one run: random weights, 30-second windows, the same batch for everyone.

    python benchmarks/train_throughput.py --out benchmarks/throughput.json
    python benchmarks/train_throughput.py --device cpu --sizes tiny --batch 2 --steps 2     # a rehearsal

A step is forward, cross-entropy, backward, gradient clipping and fused AdamW, on float32 weights under bf16 autocast.
Ours has two cross-attentions and runs through what train.py runs through; `label-free` adds the frozen teacher and all
objectives of configs/base_noise.yaml, which the peers do not have. MFU is counted as dawhisper/training/flops.py says,
for each model by its own arithmetic. The time is the median of `--rounds` rounds of `--steps` steps after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dawhisper.distributed import World
from dawhisper.errors import one_line
from dawhisper.formats.huggingface import hide_broken_torchaudio, transformers_config
from dawhisper.model import DualOptions, ModelDimensions, Whisper
from dawhisper.tools.throughput import SIZES
from dawhisper.training.cuda_graphs import Replay
from dawhisper.training.flops import peak_flops, training_flops
from dawhisper.training.inputs import Inputs, count
from dawhisper.training.losses import IGNORE
from dawhisper.training.objective import ObjectiveOptions, Student, Teacher
from dawhisper.training.optimizer import make_optimizer, optimizer_step
from dawhisper.training.parallel import attention_kernel, parallelise
from dawhisper.training.recipe import OptimOptions

BATCH = {"tiny": 32, "base": 32, "small": 32, "medium": 16, "large-v3": 16}
CROSS_ENTROPY = ObjectiveOptions(cross_entropy=1.0, logits=0.0, encoder=0.0, attention=0.0, gate=0.1, silence=0.0)
LABEL_FREE = ObjectiveOptions()

Step = Callable[[], Tensor]


def inputs_of(dims: ModelDimensions, batch: int, n_frames: int, n_tokens: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    clean_mel = torch.randn(batch, dims.n_mels, 2 * dims.n_audio_ctx, generator=generator)
    mel = clean_mel[:, :, : 2 * n_frames].clone()
    tokens = torch.randint(0, 50000, (batch, n_tokens + 1), generator=generator)
    frames = torch.ones(batch, n_frames, dtype=torch.bool)
    snr_db = torch.full((batch,), 5.0)
    tensors = (mel, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), snr_db, frames, clean_mel)
    return Inputs(*(x.to(device) for x in tensors))


def update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """The end of a step, as in train.py."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer_step(optimizer, scaler, ~(norm.isfinite() & loss.isfinite()))
    return loss


def ours(options: argparse.Namespace, inputs: Inputs, dims: ModelDimensions, objective: ObjectiveOptions) -> Step:
    world = World(inputs.mel.device)
    torch.manual_seed(0)
    model = Whisper(dims, None if options.single else DualOptions()).to(world.device)
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = options.gradient_checkpointing
    student = Student(model, objective).to(world.device)
    teacher = None
    if objective.logits:
        half = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        teacher = Teacher(Whisper(dims).to(world.device, half), objective, range(dims.n_text_layer))
    parallel = parallelise(student, teacher, world, options.compile, fsdp=False)
    optimizer = make_optimizer(student, OptimOptions())
    parameters = list(student.parameters())
    counts = count(inputs)

    def passes(inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(world.device), attention_kernel(options.attention):
            lesson = None if teacher is None else teacher(inputs)
            loss, report = parallel(inputs, lesson, counts)
            loss.backward()
        return loss.detach(), report

    run = Replay(passes) if options.graph else passes

    def step() -> Tensor:
        loss, _ = run(inputs, counts)
        update(parameters, optimizer, loss)
        optimizer.zero_grad(set_to_none=not options.graph)
        return loss

    return step


def transformers_model(options: argparse.Namespace, inputs: Inputs, dims: ModelDimensions) -> Step:
    hide_broken_torchaudio()
    from transformers import WhisperForConditionalGeneration

    config = transformers_config(dims, use_cache=False)
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa").to(inputs.mel.device)
    model.train()
    if options.compile_peers:
        model.compile(dynamic=False)

    def loss() -> Tensor:
        return model(input_features=inputs.mel, decoder_input_ids=inputs.tokens, labels=inputs.labels).loss

    return peer_step(model, loss, inputs.mel.device)


def openai_model(options: argparse.Namespace, inputs: Inputs, dims: ModelDimensions) -> Step:
    from whisper.model import ModelDimensions as OpenAIDimensions
    from whisper.model import Whisper as OpenAIWhisper

    model = OpenAIWhisper(OpenAIDimensions(**vars(dims)))
    nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # theirs is left uninitialised
    model.to(inputs.mel.device).train()
    if options.compile_peers:
        model.compile(dynamic=False)

    def loss() -> Tensor:
        logits = model(inputs.mel, inputs.tokens)
        return F.cross_entropy(logits.flatten(0, 1), inputs.labels.flatten(), ignore_index=IGNORE)

    return peer_step(model, loss, inputs.mel.device)


def peer_step(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.01, fused=True)

    def step() -> Tensor:
        with autocast(device):
            value = loss()
        value.backward()
        update(parameters, optimizer, value.detach())
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def measure(step: Step, options: argparse.Namespace, device: torch.device) -> tuple[float, float, float]:
    """Seconds a step (median of the rounds), the first step's seconds, peak memory in GiB."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - started
    for _ in range(options.warmup):
        step()
    rounds = []
    for _ in range(options.rounds):
        wait()
        started = time.perf_counter()
        for _ in range(options.steps):
            loss = step()
        wait()
        rounds.append((time.perf_counter() - started) / options.steps)
    if not loss.isfinite():
        raise RuntimeError("the loss is not finite")
    return statistics.median(rounds), first, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=BATCH, default=["base", "small", "large-v3"])
    parser.add_argument("--who", nargs="+", default=["ours", "label-free", "transformers", "openai-whisper"])
    parser.add_argument("--batch", type=int, default=0, help="windows; 0 = 32, and 16 for medium and large-v3")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", choices=["off", "encoder", "blocks", "model"], default="encoder", help="ours")
    parser.add_argument("--graph", action="store_true", help="ours: as loop.graph")
    parser.add_argument("--compile-peers", action="store_true", help="torch.compile the peers too")
    parser.add_argument("--attention", choices=["default", "cudnn", "flash"], default="default", help="ours")
    parser.add_argument("--frames", type=int, default=1500, help="encoder positions of a window; 1500 = 30 s")
    parser.add_argument("--single", action="store_true", help="ours with one cross-attention")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="ours")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, "half")
    makers: dict[str, Callable[[Inputs, ModelDimensions], Step]] = {
        "ours": lambda inputs, dims: ours(options, inputs, dims, CROSS_ENTROPY),
        "label-free": lambda inputs, dims: ours(options, inputs, dims, LABEL_FREE),
        "transformers": lambda inputs, dims: transformers_model(options, inputs, dims),
        "openai-whisper": lambda inputs, dims: openai_model(options, inputs, dims),
    }
    print(f"{name}, torch {torch.__version__}, {options.tokens} tokens, bf16 autocast, {options.attention} attention")
    print("| size | batch | who | samples/s | ms/step | MFU | GiB | first step, s |\n|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        dims, batch = SIZES[size], options.batch or BATCH[size]
        inputs = inputs_of(dims, batch, options.frames, options.tokens, device)
        for who in options.who:
            step = None
            try:
                step = makers[who](inputs, dims)
                seconds, first, memory = measure(step, options, device)
            except Exception as error:  # a peer that is missing or fails must not end the others' run
                print(f"| {size} | {batch} | {who} | {one_line(f'{type(error).__name__}: {error}')} |")
                continue
            finally:
                del step
                torch._dynamo.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            dual = DualOptions() if who in ("ours", "label-free") and not options.single else None
            flops = batch * training_flops(dims, dual, options.frames, options.tokens)
            mfu = flops / seconds / peak if peak else float("nan")
            rows.append(
                {"size": size, "batch": batch, "who": who, "samples_per_second": batch / seconds, "mfu": mfu}
                | {"step_ms": 1000 * seconds, "gib": memory, "first_step_s": first}
            )
            print(
                f"| {size} | {batch} | {who} | {batch / seconds:.1f} | {1000 * seconds:.1f} | {mfu:.3f} | "
                f"{memory:.1f} | {first:.1f} |",
                flush=True,
            )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"device": name, "torch": torch.__version__, "options": {k: str(v) for k, v in vars(options).items()}}
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
