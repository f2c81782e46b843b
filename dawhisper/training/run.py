"""A training run: its parts, where it stands, and what is saved of it. train.py is the loop over its steps."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dawhisper.checkpoint import load_model
from dawhisper.data.manifest import Report
from dawhisper.distributed import World
from dawhisper.errors import OptionError
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import Whisper

from . import snapshots
from .batches import Batches
from .cuda_graphs import TOKEN_MULTIPLE, Replay
from .dev_set import DevSet
from .inputs import Inputs
from .objective import Student, Teacher
from .optimizer import Average, make_optimizer
from .parallel import attention_kernel, parallelise
from .recipe import Recipe, differences, to_dict
from .risk import Sampler
from .surgery import check_teacher, freeze, shrink, taught_layers


class Run:
    """Everything that a recipe makes on this process of the world; a snapshot's state is put back where it resumes.

    step: optimiser steps taken; best: the lowest noisy WER so far, in percent; stale: evaluations since then;
    bad_steps [2]: steps without a finite gradient, in a row and in all.
    passes: forward and backward pass of a micro-batch: inputs, counts [5] -> the loss and its parts.
    """

    def __init__(self, recipe: Recipe, world: World):
        loop = recipe.loop
        self.recipe, self.world, self.out = recipe, world, Path(recipe.out)
        self.amp = autocast_dtype(loop.precision, world.device)
        set_numerics(recipe)
        resumed = find_snapshot(recipe, self.out)
        self.model, self.teacher = build_models(recipe, world.device, self.amp)
        freeze(self.model, recipe.freeze)
        self.average = Average(self.model, recipe.optim.ema) if recipe.optim.ema else None
        self.student = Student(self.model, recipe.objective).to(world.device)
        compile = compile_mode(loop.compile, world.device)
        multiple = 64 if compile == "model" else TOKEN_MULTIPLE if loop.graph else 1
        self.batches = Batches(recipe, self.model, self.teacher.model if self.teacher else None, world, multiple)
        self.parallel = parallelise(self.student, self.teacher, world, compile, loop.fsdp, loop.graph)
        self.optimizer = make_optimizer(self.student, recipe.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp is torch.float16)
        self.sampler = (
            Sampler(self.model, recipe.objective, self.amp or torch.float32) if recipe.objective.risk else None
        )
        self.passes = Replay(self._passes) if loop.graph else self._passes
        self.evaluate = Evaluator(self) if recipe.data.dev and recipe.evaluate.every else None
        self.step, self.best, self.stale = 0, math.inf, 0
        self.saved = time.monotonic()
        self.bad_steps = torch.zeros(2, device=world.device)
        if resumed is not None:
            self.restore(resumed)

    def _passes(self, inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hypotheses = None if self.sampler is None else self.sampler(self.model, inputs)
        with numerics(self.recipe.loop.attention, self.amp, self.world.device):
            lesson = None if self.teacher is None else self.teacher(inputs)
            loss, report = self.parallel(inputs, lesson, counts, hypotheses)
            self.scaler.scale(loss).backward()
        return loss.detach(), report

    def weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and to ship: the average, if any. With sharding, every process must ask."""
        if self.average is not None:
            return self.average.model.state_dict()
        state = snapshots.student_state(self.student, self.recipe.loop.fsdp)
        return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}

    def save(self) -> None:
        """Write a snapshot that `restore` goes on from, the weights by themselves, and what of the data was dropped."""
        sharded = self.recipe.loop.fsdp
        state = {
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "recipe": to_dict(self.recipe),
            "student": snapshots.student_state(self.student, sharded),
            "optimizer": snapshots.optimizer_state(self.student, self.optimizer, sharded),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
            "feed": self.batches.state_dict(),
            "random": self.world.gather(snapshots.rng_state()),
        }
        reports = self.world.gather(list(self.batches.loader.report))
        if self.world.main:
            snapshots.write_snapshot(state, self.out, self.step, self.recipe.loop.keep)
            merged = Report()
            for what, why in (found for report in reports for found in report):
                merged.add(what, why)
            merged.write(self.out / "dropped.jsonl")
        self.save_weights("last.safetensors")
        self.saved = time.monotonic()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        snapshots.load_snapshot(
            self.student, self.optimizer, state, self.recipe.loop.fsdp, state["recipe"]["loop"]["fsdp"]
        )
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.model.load_state_dict(state["average"])
        self.batches.load_state_dict(state["feed"])
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        if len(state["random"]) == self.world.size:  # else: other devices than then, and fresh random numbers for them
            snapshots.set_rng_state(state["random"][self.world.rank])
        changed = list(differences(state["recipe"], to_dict(self.recipe)))
        if self.world.main and changed:
            print("resumed with another recipe: " + "; ".join(changed[:10]), flush=True)

    def save_weights(self, name: str, rates: dict[str, float] | None = None) -> None:
        """The model alone, as a dawhisper file with the recipe in its metadata."""
        weights = self.weights()
        if self.world.main:
            model = self.plain_model()
            model.load_state_dict(weights)
            model.alignment_heads = self.model.alignment_heads.cpu()
            self.out.mkdir(parents=True, exist_ok=True)
            made = {"recipe": to_dict(self.recipe), "step": self.step} | ({} if rates is None else {"dev_wer": rates})
            save_model(model, self.out / name, base_model=self.recipe.model.name, recipe=made)
        self.world.wait()

    def plain_model(self) -> Whisper:
        """A model of the student's sizes, with weights of its own."""
        model = Whisper(self.model.dims, self.model.dual, self.model.variable_audio_ctx)
        model.knows_silence = self.model.knows_silence
        return model

    def describe(self) -> str:
        """Model, data and devices of the run, in two lines for the terminal."""
        total = sum(p.numel() for p in self.model.parameters())
        learns = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        data, loop, loader = self.recipe.data, self.recipe.loop, self.batches.loader
        windows = data.batch_size * loop.accumulate * self.world.size
        precision = "fp32" if self.amp is None else str(self.amp).removeprefix("torch.")
        return (
            f"{self.recipe.model.name}: {total / 1e6:.1f}M weights, {learns / 1e6:.1f}M learn"
            f"{', two branches' if self.model.dual else ''}{', with a teacher' if self.teacher else ''}; "
            f"{len(loader.utterances)} clips, {loader.hours:.1f} h"
            f"{f', {self.batches.dropped} dropped' if self.batches.dropped else ''}\n"
            f"{loop.steps} steps of {windows} windows on {self.world.size} x {self.world.device.type}, {precision}"
        )


class Evaluator:
    """Dev word error rates of a run's weights, by a plain copy of the model in half precision."""

    def __init__(self, run: Run):
        recipe, world = run.recipe, run.world
        self.dev_set = DevSet(recipe.data, recipe.evaluate, recipe.seed, world)
        self.model = run.plain_model().to(world.device, run.amp or torch.float32).eval()

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        self.model.load_state_dict(weights)
        return self.dev_set.evaluate(self.model)


def build_models(recipe: Recipe, device: torch.device, amp: torch.dtype | None) -> tuple[Whisper, Teacher | None]:
    """The student's model and the frozen teacher, None where nothing asks for it."""
    o, options = recipe.objective, recipe.model
    model = load_model(options.name, device="cpu", dtype=torch.float32)
    if options.encoder_layers is not None or options.decoder_layers is not None:
        model = shrink(model, options.encoder_layers, options.decoder_layers)
    if options.dual and model.dual is None:
        try:
            model.add_second_branch(options.branch)
        except ValueError as error:  # more layers of its own than there are
            raise OptionError(str(error)) from None
    if not options.dual and model.dual is not None:
        raise OptionError(f"model.dual is false, but {options.name} has two branches: start from a stock checkpoint")
    if recipe.augment.cleaned_apart and not model.encoder.hears_twice:
        raise OptionError("augment.cleaned_apart needs branches that hear apart: set model.branch.memory_layers=-1")
    model.variable_audio_ctx = model.variable_audio_ctx or recipe.loop.variable_ctx > 0
    model.knows_silence = model.knows_silence or bool(o.silence and recipe.augment.noise_only_prob)
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = recipe.loop.gradient_checkpointing
    model.to(device).train()
    if not (o.logits or o.encoder or o.layers or o.attention):
        return model, None
    teacher = load_model(options.teacher or options.name, device=device, dtype=amp or torch.float32)
    check_teacher(model, teacher, o)
    return model, Teacher(teacher, o, taught_layers(model, teacher, options))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, None for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise OptionError("loop.precision=fp16 needs a GPU; use fp32 or bf16 on the CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def compile_mode(mode: str, device: torch.device) -> str:
    return ("encoder" if device.type == "cuda" else "off") if mode == "auto" else mode


def set_numerics(recipe: Recipe) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32
    torch.backends.cudnn.allow_tf32 = True
    if torch.cuda.is_available():
        torch.backends.cuda.cufft_plan_cache.max_size = 64  # each plan has memory outside of torch's pool
    if recipe.loop.memory_share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(recipe.loop.memory_share)
    torch.manual_seed(recipe.seed)  # the new weights are the same on every device; data has generators of its own
    if recipe.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def numerics(attention: str, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    with attention_kernel(attention), nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        yield


def synchronised(parallel: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """A context whose backward pass exchanges gradients between processes only if it is the `last` of its step."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
        return nullcontext()
    if isinstance(parallel, nn.parallel.DistributedDataParallel) and not last:
        return parallel.no_sync()
    return nullcontext()


def full_norm(norm: Tensor) -> Tensor:
    """The norm of all gradients, gathered from the devices where they are sharded."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def amp_overflow(scaler: torch.amp.GradScaler) -> bool:
    """Whether gradients that are not finite may come of fp16's loss scale, which can still be lowered."""
    return scaler.is_enabled() and scaler.get_scale() > 1.0


def find_snapshot(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The state to go on from, if any."""
    existing = snapshots.snapshots(out)
    if recipe.resume == "auto":
        return snapshots.read_snapshot(existing[-1]) if existing else None
    if recipe.resume != "none":
        return snapshots.read_snapshot(Path(recipe.resume))
    if existing and not recipe.dry_run:
        raise OptionError(f"{out} holds the checkpoints of a run: resume=auto goes on, out=OTHER starts a new one")
    return None


def dry_run_report(world: World) -> str:
    if world.device.type == "cuda":
        used, there = torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
        return f"dry run: {used / 2**30:.1f} of {there / 2**30:.1f} GiB of GPU memory at most; nothing was written"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"dry run: {used / 2**30:.1f} GiB of memory at most; nothing was written"


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short: torch says so, the libraries beside it only that something failed."""
    signs = (
        *("out of memory", "CUFFT_INTERNAL_ERROR", "CUFFT_ALLOC_FAILED"),
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED"),
    )
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def out_of_memory(recipe: Recipe) -> str:
    data, loop = recipe.data, recipe.loop
    ways = [f"data.batch_size (now {data.batch_size}; loop.accumulate makes up for it)"]
    if not loop.gradient_checkpointing:
        ways.append("or set loop.gradient_checkpointing=true")
    if data.in_memory:
        ways.append("or data.in_memory=false")
    if loop.memory_share > 0.8:
        ways.append("or loop.memory_share=0.75, which leaves more to cuFFT and the like")
    if not loop.fsdp:
        ways.append("or on several devices loop.fsdp=true")
    return f"out of memory: lower {', '.join(ways)}"
