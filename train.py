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
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dawhisper.distributed import World
from dawhisper.errors import DawhisperError, OptionError

try:
    from dawhisper.training.inputs import count
    from dawhisper.training.log import Log
    from dawhisper.training.optimizer import optimizer_step, rate_factor, set_rate
    from dawhisper.training.recipe import Recipe, read_recipe
    from dawhisper.training.run import (
        Run,
        amp_overflow,
        dry_run_report,
        full_norm,
        out_of_memory,
        ran_out_of_memory,
        synchronised,
    )
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
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        print(f"train: error: {out_of_memory(recipe)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if world is not None:
            world.leave()


def train(recipe: Recipe, world: World) -> int:
    """Run the recipe to its end; the exit code."""
    run = Run(recipe, world)
    log = Log(recipe, run.model, world, run.step, run.amp)
    log.say(run.describe())
    steps = min(recipe.loop.steps, run.step + 2) if recipe.dry_run else recipe.loop.steps
    with termination() as terminated:
        if run.evaluate is not None and run.step == 0 and not recipe.dry_run:
            log.evaluation(0, run.evaluate(run.weights()))
        while run.step < steps:
            log.go_on()
            take_step(run, log)
            if run.step < steps:
                run.batches.begin(run.step)
            # Everything from here on may wait for the device, and does not happen at every step.
            last = run.step == steps
            stop, due = report(run, log, terminated, last)
            if recipe.dry_run:
                continue
            early = not stop and evaluate(run, log, last)
            if run.step % recipe.loop.save_every == 0 or last or due or stop or early:
                log.pause()
                run.save()
            if stop or early:
                why = "SIGTERM; resume=auto goes on" if stop else "no better noisy WER"
                log.say(f"stopped at step {run.step}: {why}")
                break
    if recipe.dry_run:
        log.say(dry_run_report(world))
    run.batches.close()
    log.close()
    return STOPPED if terminated else 0


def take_step(run: Run, log: Log) -> None:
    """One optimiser step over `accumulate` micro-batches. Nothing in it waits for the device."""
    recipe, world = run.recipe, run.world
    micro_batches = run.batches.step(run.step)
    counts = world.sum(torch.stack([count(inputs) for inputs in micro_batches]).sum(0)) / world.size
    set_rate(run.optimizer, rate_factor(run.step, recipe.loop.steps, recipe.optim.warmup, recipe.optim.final))
    finite = torch.ones((), device=world.device)
    for inputs in micro_batches:
        with synchronised(run.parallel, inputs is micro_batches[-1]):
            loss, parts = run.passes(inputs, counts)
        finite = finite * loss.isfinite()
        log.add(inputs, loss, parts)
    if recipe.loop.graph:
        world.average([p.grad for p in run.parameters if p.grad is not None])
    run.scaler.unscale_(run.optimizer)
    norm = full_norm(nn.utils.clip_grad_norm_(run.parameters, recipe.optim.clip or math.inf, foreach=True))
    bad = (world.sum(1 - finite) > 0) | ~norm.isfinite()
    optimizer_step(run.optimizer, run.scaler, bad)
    run.optimizer.zero_grad(set_to_none=not recipe.loop.graph)
    run.bad_steps = torch.stack([(run.bad_steps[0] + 1) * bad, run.bad_steps[1] + bad])
    run.step += 1
    if run.average is not None:
        run.average.update(run.student.model, run.step)
    log.finished(norm)
    run.batches.mark()


def report(run: Run, log: Log, terminated: list[int], last: bool) -> tuple[bool, bool]:
    """Write the log's line where one is due. Returns whether a process was told to stop, and whether the minutes since
    the last snapshot ask for one; the processes agree on both there.
    """
    loop, world = run.recipe.loop, run.world
    stop = bool(terminated) if world.size == 1 else False
    if not (run.step % loop.log_every == 0 or last or stop or run.recipe.dry_run):
        return stop, False
    stop = world.any(bool(terminated))
    due = world.any(0 < loop.save_minutes <= (time.monotonic() - run.saved) / 60)
    bad_in_a_row = log.write(run.step, run.optimizer, run.bad_steps, run.batches)
    if bad_in_a_row >= loop.max_bad_steps and not amp_overflow(run.scaler):
        raise OptionError(
            f"{bad_in_a_row:.0f} steps in a row gave a loss or gradient that is not finite (step {run.step}): "
            "lower optim.lr, lr_new and lr_gate, use loop.precision=bf16, or look at the data"
        )
    return stop, due


def evaluate(run: Run, log: Log, last: bool) -> bool:
    """Dev word errors where they are due; the best weights are kept. Returns whether patience is at its end."""
    options = run.recipe.evaluate
    if run.evaluate is None or not (run.step % options.every == 0 or last):
        return False
    log.pause()
    rates = run.evaluate(run.weights())
    better = rates["noisy"] < run.best
    run.best, run.stale = (rates["noisy"], 0) if better else (run.best, run.stale + 1)
    log.evaluation(run.step, rates)
    if better:
        run.save_weights("best.safetensors", rates)
    return 0 < options.patience <= run.stale


@contextmanager
def termination() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM has come."""
    terminated: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
