"""Train a noise-robust Whisper.

    python train.py configs/base_noise.yaml data.train=DIR/manifest.jsonl data.noise=DIR key=value ...
    torchrun --nproc_per_node 8 train.py configs/base_noise.yaml ...

One optimiser step: `accumulate` micro-batches are mixed with noise on the device; the frozen teacher hears the clean
audio, the student the mixture; the losses are averaged over all the micro-batches and devices of the step together, so
that the result does not depend on how a batch is split. `resume=auto` goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dawhisper.checkpoint import load_model
from dawhisper.data.loader import Report
from dawhisper.distributed import World
from dawhisper.errors import DawhisperError, OptionError
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import Whisper

try:
    from dawhisper.training import snapshots as snapshot
    from dawhisper.training.batches import Feed
    from dawhisper.training.cuda_graphs import TOKEN_MULTIPLE, Replay
    from dawhisper.training.dev_set import DevSet
    from dawhisper.training.inputs import Inputs, count
    from dawhisper.training.log import Log
    from dawhisper.training.objective import Student, Teacher
    from dawhisper.training.optimizer import Average, make_optimizer, optimizer_step, rate_factor, set_rate
    from dawhisper.training.parallel import attention_kernel, parallelise
    from dawhisper.training.recipe import Recipe, differences, read_recipe, to_dict
    from dawhisper.training.surgery import check_teacher, freeze, shrink, taught_layers
except ModuleNotFoundError as e:
    sys.exit(f"train: error: training needs {e.name}, which is not installed: pip install 'dawhisper[train]'")

STOPPED = 128 + signal.SIGTERM  # exit code after SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a noise-robust Whisper by a recipe.")
    parser.add_argument("config", help="a recipe, for example configs/base_noise.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, for example optim.lr=1e-4")
    options = parser.parse_args(arguments)
    world: World | None = None
    try:
        recipe = read_recipe(options.config, options.overrides)
        world = World.join(recipe.device)
        return train(recipe, world)
    except DawhisperError as error:
        print(f"train: error: {error}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError:
        print(f"train: error: {out_of_memory(recipe)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if world is not None:
            world.leave()


@dataclass
class Progress:
    """Where the run stands."""

    step: int = 0
    best: float = math.inf  # noisy WER
    stale: int = 0  # evaluations since then


def train(recipe: Recipe, world: World) -> int:
    """Run the recipe to its end; the exit code."""
    loop, out = recipe.loop, Path(recipe.out)
    amp = autocast_dtype(loop.precision, world.device)
    set_numerics(recipe)
    resumed = find_snapshot(recipe, out)

    model, teacher = build(recipe, world.device, amp)
    freeze(model, recipe.freeze)
    average = Average(model, recipe.optim.ema) if recipe.optim.ema else None
    student = Student(model, recipe.objective).to(world.device)
    compile = compile_mode(loop.compile, world.device)
    multiple = 64 if compile == "model" else TOKEN_MULTIPLE if loop.graph else 1
    feed = Feed(recipe, model, teacher.model if teacher else None, world, multiple)
    parallel = parallelise(student, teacher, world, compile, loop.fsdp, loop.graph)
    optimizer = make_optimizer(student, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)
    judge = Judge(recipe, model, world, amp) if recipe.data.dev and recipe.evaluate.every else None
    progress = Progress()
    if resumed is not None:
        restore(resumed, recipe, student, optimizer, scaler, average, feed, progress, world)
    log = Log(recipe, model, world, progress.step, amp)
    log.say(describe(recipe, model, teacher, feed, world, amp))

    def passes(inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward pass of one micro-batch: the loss and its parts."""
        with numerics(loop.attention, amp, world.device):
            lesson = None if teacher is None else teacher(inputs)
            loss, report = parallel(inputs, lesson, counts)
            scaler.scale(loss).backward()
        return loss.detach(), report

    run = Replay(passes) if loop.graph else passes
    terminated: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    steps = min(loop.steps, progress.step + 2) if recipe.dry_run else loop.steps
    bad_steps = torch.zeros(2, device=world.device)  # in a row, in all
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if judge is not None and progress.step == 0 and not recipe.dry_run:
        log.evaluation(0, judge(weights_of(student, average, loop.fsdp)))

    while progress.step < steps:
        step = progress.step
        log.go_on()
        micro_batches = feed.step(step)
        counts = world.sum(torch.stack([count(inputs) for inputs in micro_batches]).sum(0)) / world.size
        set_rate(optimizer, rate_factor(step, loop.steps, recipe.optim.warmup, recipe.optim.final))
        finite = torch.ones((), device=world.device)
        for inputs in micro_batches:
            with synchronised(parallel, inputs is micro_batches[-1]):
                loss, report = run(inputs, counts)
            finite = finite * loss.isfinite()
            log.add(inputs, loss, report)
        if loop.graph:
            world.average([p.grad for p in parameters if p.grad is not None])
        scaler.unscale_(optimizer)
        norm = whole(nn.utils.clip_grad_norm_(parameters, recipe.optim.clip or math.inf, foreach=True))
        bad = (world.sum(1 - finite) > 0) | ~norm.isfinite()
        optimizer_step(optimizer, scaler, bad)
        optimizer.zero_grad(set_to_none=not loop.graph)
        bad_steps = torch.stack([(bad_steps[0] + 1) * bad, bad_steps[1] + bad])
        progress.step = step = step + 1
        if average is not None:
            average.update(student.model, step)
        log.finished(norm)
        feed.mark()
        if step < steps:
            feed.begin(step)

        # Everything from here on may wait for the device, and does not happen at every step.
        stop = bool(terminated) if world.size == 1 else False
        if step % loop.log_every == 0 or step == steps or stop or recipe.dry_run:
            stop = world.any(bool(terminated))
            bad_in_a_row = log.write(step, optimizer, bad_steps, feed)
            if bad_in_a_row >= loop.max_bad_steps and not amp_overflow(scaler):
                raise OptionError(
                    f"{bad_in_a_row:.0f} steps in a row gave a loss or gradient that is not finite (step {step}): "
                    "lower optim.lr, lr_new and lr_gate, use loop.precision=bf16, or look at the data"
                )
        if recipe.dry_run:
            continue
        early = False
        if judge is not None and (step % recipe.evaluate.every == 0 or step == steps) and not stop:
            log.pause()
            rates = judge(weights_of(student, average, loop.fsdp))
            better = rates["noisy"] < progress.best
            progress.best, progress.stale = (rates["noisy"], 0) if better else (progress.best, progress.stale + 1)
            log.evaluation(step, rates)
            if better:
                save_weights(out / "best.safetensors", student, average, recipe, world, step, rates)
            early = 0 < recipe.evaluate.patience <= progress.stale
        if step % loop.save_every == 0 or step == steps or stop or early:
            log.pause()
            save(out, recipe, student, optimizer, scaler, average, feed, progress, world)
        if stop or early:
            log.say(f"stopped at step {step}: " + ("SIGTERM; resume=auto goes on" if stop else "no better noisy WER"))
            break

    if recipe.dry_run:
        log.say(dry_run_report(world))
    elif not terminated:
        save_weights(out / "last.safetensors", student, average, recipe, world, progress.step)
    feed.close()
    log.close()
    signal.signal(signal.SIGTERM, previous)
    return STOPPED if terminated else 0


# ---- what runs ----------------------------------------------------------------------------------------------------


def build(recipe: Recipe, device: torch.device, amp: torch.dtype | None) -> tuple[Whisper, Teacher | None]:
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
    model.variable_audio_ctx = model.variable_audio_ctx or recipe.loop.variable_ctx > 0
    model.knows_silence = model.knows_silence or bool(o.silence and recipe.augment.noise_only_prob)
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = recipe.loop.gradient_checkpointing
    model.to(device).train()
    if not (o.logits or o.encoder or o.attention):
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


@contextmanager
def numerics(attention: str, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    with attention_kernel(attention), nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        yield


def compile_mode(mode: str, device: torch.device) -> str:
    return ("encoder" if device.type == "cuda" else "off") if mode == "auto" else mode


def set_numerics(recipe: Recipe) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32
    torch.backends.cudnn.allow_tf32 = True
    if recipe.loop.memory_share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(recipe.loop.memory_share)
    torch.manual_seed(recipe.seed)  # the new weights are the same on every device; data has generators of its own
    if recipe.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def synchronised(parallel: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged in the backward pass of a step's last micro-batch alone."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
        return nullcontext()
    if isinstance(parallel, nn.parallel.DistributedDataParallel) and not last:
        return parallel.no_sync()
    return nullcontext()


def whole(norm: Tensor) -> Tensor:
    """A sharded gradient's norm is put together from its parts."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def amp_overflow(scaler: torch.amp.GradScaler) -> bool:
    """fp16 overflows while its scale is being found; it is lost only when the scale has nothing left to give."""
    return scaler.is_enabled() and scaler.get_scale() > 1.0


def weights_of(student: Student, average: Average | None, sharded: bool) -> dict[str, Tensor]:
    """The weights to judge and to ship: the average where there is one. With sharding, every process must ask."""
    if average is not None:
        return average.model.state_dict()
    state = snapshot.student_state(student, sharded)
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


class Judge:
    """Dev word error rates of the weights, by a plain copy of the model in half precision."""

    def __init__(self, recipe: Recipe, model: Whisper, world: World, amp: torch.dtype | None):
        self.dev = DevSet(recipe.data, recipe.evaluate, recipe.seed, world)
        self.model = Whisper(model.dims, model.dual, model.variable_audio_ctx).to(world.device, amp or torch.float32)
        self.model.knows_silence = model.knows_silence
        self.model.eval()

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, float]:
        self.model.load_state_dict(weights)
        return self.dev.evaluate(self.model)


# ---- saving and resuming ------------------------------------------------------------------------------------------


def find_snapshot(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The state to go on from, if any."""
    existing = snapshot.snapshots(out)
    if recipe.resume == "auto":
        return snapshot.read(existing[-1]) if existing else None
    if recipe.resume != "none":
        return snapshot.read(Path(recipe.resume))
    if existing and not recipe.dry_run:
        raise OptionError(f"{out} holds the checkpoints of a run: resume=auto goes on, out=OTHER starts a new one")
    return None


def save(
    out: Path,
    recipe: Recipe,
    student: Student,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average | None,
    feed: Feed,
    progress: Progress,
    world: World,
) -> None:
    sharded = recipe.loop.fsdp
    state = {
        "step": progress.step,
        "best": progress.best,
        "stale": progress.stale,
        "recipe": to_dict(recipe),
        "student": snapshot.student_state(student, sharded),
        "optimizer": snapshot.optimizer_state(student, optimizer, sharded),
        "scaler": scaler.state_dict(),
        "average": None if average is None else average.model.state_dict(),
        "feed": feed.state_dict(),
        "random": world.gather(snapshot.rng_state()),
    }
    reports = world.gather(list(feed.loader.report))
    if world.main:
        snapshot.write(state, out, progress.step, recipe.loop.keep)
        merged = Report()
        for what, why in (found for report in reports for found in report):
            merged.add(what, why)
        merged.write(out / "dropped.jsonl")
    world.wait()


def restore(
    state: dict[str, Any],
    recipe: Recipe,
    student: Student,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average | None,
    feed: Feed,
    progress: Progress,
    world: World,
) -> None:
    snapshot.load(student, optimizer, state, recipe.loop.fsdp, state["recipe"]["loop"]["fsdp"])
    scaler.load_state_dict(state["scaler"])
    if average is not None and state["average"] is not None:
        average.model.load_state_dict(state["average"])
    feed.load_state_dict(state["feed"])
    progress.step, progress.best, progress.stale = state["step"], state["best"], state["stale"]
    if len(state["random"]) == world.size:  # else: other devices than then, and fresh random numbers for them
        snapshot.set_rng_state(state["random"][world.rank])
    changed = list(differences(state["recipe"], to_dict(recipe)))
    if world.main and changed:
        print("resumed with another recipe: " + "; ".join(changed[:10]), flush=True)


def save_weights(
    path: Path,
    student: Student,
    average: Average | None,
    recipe: Recipe,
    world: World,
    step: int,
    rates: dict[str, float] | None = None,
) -> None:
    """The model alone, as a dawhisper file with the recipe in its metadata."""
    weights = weights_of(student, average, recipe.loop.fsdp)
    if world.main:
        model = Whisper(student.model.dims, student.model.dual, student.model.variable_audio_ctx)
        model.load_state_dict(weights)
        model.alignment_heads = student.model.alignment_heads.cpu()
        model.knows_silence = student.model.knows_silence
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"recipe": to_dict(recipe), "step": step} | ({} if rates is None else {"dev_wer": rates})
        save_model(model, path, base_model=recipe.model.name, recipe=made)
    world.wait()


# ---- what is said ---------------------------------------------------------------------------------------------------


def describe(
    recipe: Recipe, model: Whisper, teacher: Teacher | None, feed: Feed, world: World, amp: torch.dtype | None
) -> str:
    """What is about to happen, in two lines."""
    total = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data, loop = recipe.data, recipe.loop
    batch = data.batch_size * loop.accumulate * world.size
    precision = "fp32" if amp is None else str(amp).removeprefix("torch.")
    return (
        f"{recipe.model.name}: {total / 1e6:.1f}M weights, {learns / 1e6:.1f}M learn"
        f"{', two branches' if model.dual else ''}{', with a teacher' if teacher else ''}; "
        f"{len(feed.loader.utterances)} clips, {feed.loader.hours:.1f} h"
        f"{f', {feed.dropped} dropped' if feed.dropped else ''}\n"
        f"{loop.steps} steps of {batch} windows on {world.size} x {world.device.type}, {precision}"
    )


def dry_run_report(world: World) -> str:
    if world.device.type == "cuda":
        used, there = torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
        return f"dry run: {used / 2**30:.1f} of {there / 2**30:.1f} GiB of GPU memory at most; nothing was written"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"dry run: {used / 2**30:.1f} GiB of memory at most; nothing was written"


def out_of_memory(recipe: Recipe) -> str:
    data, loop = recipe.data, recipe.loop
    ways = [f"data.batch_size (now {data.batch_size}; loop.accumulate makes up for it)"]
    if not loop.gradient_checkpointing:
        ways.append("or set loop.gradient_checkpointing=true")
    if data.in_memory:
        ways.append("or data.in_memory=false")
    if not loop.fsdp:
        ways.append("or on several devices loop.fsdp=true")
    return f"out of memory: lower {', '.join(ways)}"


if __name__ == "__main__":
    sys.exit(main())
