"""What a training run shows: a progress bar, one line in a while, log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from dawhisper.distributed import World
from dawhisper.model import Whisper

from .batches import Batches
from .flops import peak_flops, training_flops
from .inputs import Inputs
from .recipe import Recipe


class Log:
    """Collects what happens in steps; sums stay on the device until a line is written.

    A line is about all steps since the last one, over all devices: losses, rates, the last step's gradient norm, the
    mean gate on clean and on noisy windows, windows per second, MFU (flops.py), and the share of the time in which the
    device waited for data. Evaluation and saving are not in the times. `start`: the step that the run begins at.
    """

    def __init__(self, recipe: Recipe, model: Whisper, world: World, start: int, amp: torch.dtype | None):
        self.recipe, self.model, self.world = recipe, model, world
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        self.peak = peak_flops(name, "fp32" if amp is None else "half")
        self.norm = torch.zeros((), device=world.device)
        self.bar: tqdm[Any] | None = None
        self.file: TextIO | None = None
        self.board: Any = None
        if world.main and not recipe.dry_run:
            out = Path(recipe.out)
            out.mkdir(parents=True, exist_ok=True)
            self.file = (out / "log.jsonl").open("a+", encoding="utf-8")
            self._forget_after(start)
            self.board = self._open_board(out, start)
        if world.main:
            total = recipe.loop.steps if not recipe.dry_run else start + 2
            self.bar = tqdm(total=total, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.sums: dict[str, Tensor] = {}
        self.started: float | None = None
        self._reset()

    def _open_board(self, out: Path, start: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard pages: pip install tensorboard; log.jsonl holds the same numbers")
            return None
        return SummaryWriter(str(out), purge_step=start + 1)

    def _forget_after(self, step: int) -> None:
        """Lines later than the checkpoint that the run goes on from will be written again."""
        assert self.file is not None
        self.file.seek(0)
        kept = [line for line in self.file if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.file.seek(0)
        self.file.truncate()
        self.file.writelines(kept)

    def _reset(self) -> None:
        self.sums, self.steps, self.windows, self.flops = {}, 0, 0, 0.0
        self.active, self.started = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until the next step: evaluating and saving are no training."""
        if self.started is not None:
            self.active += time.perf_counter() - self.started
            self.started = None

    def go_on(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def add(self, inputs: Inputs, loss: Tensor, report: dict[str, Tensor]) -> None:
        for name, value in {"loss": loss, **report}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        windows, n_frames = inputs.frames.shape
        self.windows += windows
        self.flops += windows * training_flops(self.model.dims, self.model.dual, n_frames, inputs.tokens.shape[1])

    def finished(self, norm: Tensor) -> None:
        self.steps += 1
        self.norm = norm
        if self.bar is not None:
            self.bar.update()

    def write(self, step: int, optimizer: torch.optim.Optimizer, bad_steps: Tensor, batches: Batches) -> float:
        """One line about what happened since the last one, over all devices. Returns the bad steps in a row."""
        names = list(self.sums)
        sums = self.world.sum(torch.stack([self.sums[name].float() for name in names]))
        numbers = torch.cat([sums, self.norm[None], bad_steps]).tolist()  # here the host waits for the device
        self.pause()
        values, (norm, bad_in_a_row, skipped) = dict(zip(names, numbers)), numbers[len(names) :]
        record: dict[str, float] = {"step": step}
        for name, value in values.items():
            if "/" not in name:  # a part of the loss
                record["loss" if name == "loss" else f"loss/{name}"] = value / (self.world.size * self.steps)
        for kind in ("clean", "noisy"):
            if values.get(f"gate/{kind}_count"):
                record[f"gate/{kind}"] = values[f"gate/{kind}_sum"] / values[f"gate/{kind}_count"]
        for group in optimizer.param_groups:
            record[f"rate/{group['name']}"] = group["lr"]
        seconds = max(self.active, 1e-9)
        record |= {"norm": norm, "skipped": skipped, "dropped": batches.dropped, "wait": batches.waited / seconds}
        record |= {"samples_per_second": self.windows * self.world.size / seconds, "step_seconds": seconds / self.steps}
        if self.peak is not None:
            record["mfu"] = self.flops / seconds / self.peak
        self._emit(record)
        gates = "".join(f", gate {k} {record[f'gate/{k}']:.2f}" for k in ("clean", "noisy") if f"gate/{k}" in record)
        self.say(
            f"step {step}: loss {record['loss']:.4f}, norm {norm:.2f}, "
            f"lr {max(group['lr'] for group in optimizer.param_groups):.2e}{gates}, "
            f"{record['samples_per_second']:.1f} samples/s"
            + (f", MFU {record['mfu']:.2f}" if "mfu" in record else "")
            + f", wait {100 * record['wait']:.0f}%"
            + (f", {skipped:.0f} steps skipped" if skipped else "")
        )
        batches.waited = 0.0
        self._reset()
        return bad_in_a_row

    def evaluation(self, step: int, rates: dict[str, float]) -> None:
        self._emit({"step": step} | {f"wer/{name}": rate for name, rate in rates.items()})
        self.say(f"step {step}: WER " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))

    def _emit(self, record: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(record["step"]))

    def say(self, text: str) -> None:
        if self.world.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        for thing in (self.bar, self.file, self.board):
            if thing is not None:
                thing.close()
