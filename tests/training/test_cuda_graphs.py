"""Replayed passes are the loop's own: on the CPU through the same memory without, on a GPU with CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training import run
from torch import Tensor

from dawhisper.model import DualOptions, ModelDimensions, Whisper
from dawhisper.training import cuda_graphs as replay
from dawhisper.training.cuda_graphs import Passes, Replay
from dawhisper.training.inputs import Inputs, count
from dawhisper.training.losses import IGNORE
from dawhisper.training.objective import ObjectiveOptions, Student, Teacher

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DIMS = ModelDimensions(80, 60, 64, 2, 2, 500, 48, 64, 2, 2)
OBJECTIVE = ObjectiveOptions(cross_entropy=0.5, noise_attention=0.1, noise_mel=0.1)


def micro_batch(seed: int, n_frames: int, n_tokens: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels = torch.randint(0, 500, (3, n_tokens), generator=generator)
    labels[:, -seed % 4 :] = IGNORE
    inputs = Inputs(
        mel=random(3, 80, 2 * n_frames),
        tokens=torch.randint(0, 500, (3, n_tokens), generator=generator),
        labels=labels,
        snr_db=torch.tensor([5.0, torch.inf, -torch.inf]).roll(seed),
        frames=random(3, n_frames) > 0.2,
        clean_mel=random(3, 80, 120),
        noise_mel=random(3, 80, 2 * n_frames),
        dominance=random(3, n_frames),
    )
    return Inputs(*(x.to(device) for x in inputs if x is not None))


def trained(device: str, replayed: bool, steps: list[list[Inputs]]) -> tuple[list[list[float]], Student]:
    """A small student after plain gradient steps, and each micro-batch's loss and report."""
    torch.manual_seed(0)
    student = Student(Whisper(DIMS, DualOptions(memory_layers=1)), OBJECTIVE).to(device)
    student.model.decoder.token_embedding.requires_grad_(False)  # one without a gradient
    teacher = Teacher(Whisper(DIMS).to(device), OBJECTIVE, range(2))

    def passes(inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, report = student(inputs, teacher(inputs), counts)
        loss.backward()
        return loss.detach(), report

    run: Passes = Replay(passes) if replayed else passes
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    told = []
    for micro_batches in steps:
        counts = torch.stack([count(inputs) for inputs in micro_batches]).sum(0)
        results = [run(inputs, counts) for inputs in micro_batches]  # kept over the next one's replay
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not replayed)
        told += [[loss.item(), *(report[name].item() for name in sorted(report))] for loss, report in results]
    return told, student


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [64, 1])
def test_equal_to_the_plain_passes(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_GRAPHS", most)
    shapes = [(60, 16), (40, 16), (60, 16), (60, 24), (40, 16), (60, 16), (60, 24), (40, 16), (60, 24), (60, 16)]
    batches = [micro_batch(i, *shape, device) for i, shape in enumerate(shapes)]
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    expected, student = trained(device, False, steps)
    told, same = trained(device, True, steps)
    assert len({tuple(one) for one in expected}) == len(batches)
    assert told == [pytest.approx(one, rel=1e-4, abs=1e-6) for one in expected]
    for mine, other in zip(student.parameters(), same.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_run_with_graphs_is_the_same_run(world: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("loop.accumulate=2", "loop.variable_ctx=0.5", "loop.ctx_multiple=30", "data.batch_size=2")
    plain = run(world, tmp_path / "plain", *overrides)
    assert run(world, tmp_path / "replayed", *overrides, "loop.graph=true") == pytest.approx(plain, rel=1e-4)
