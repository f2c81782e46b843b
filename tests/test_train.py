"""The training loop, run for real on a CPU: a random model of 2-second windows, synthetic clips, a few steps."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sound import write_wav
from helpers.training import arguments, command, curve, environment, records, run, run_in_two

import train
from dawhisper.checkpoint import load_model, read_config
from dawhisper.errors import OptionError
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import AudioEncoder, DualOptions, ModelDimensions, Whisper
from dawhisper.training.objective import Student, Teacher
from dawhisper.training.surgery import shrink

ROOT = Path(__file__).resolve().parent.parent
QUIET = ("augment.noise_prob=0", "augment.noise_only_prob=0", "augment.clean_prob=1")  # the same audio on any rank


@pytest.fixture(scope="module")
def unbroken(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Eight steps in noise, without a break; the last state is saved."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, run(world, out, "loop.steps=8")


def test_a_run_learns_evaluates_and_saves(world: dict[str, Path], tmp_path: Path) -> None:
    losses = run(
        world, tmp_path, "loop.steps=30", "loop.log_every=5", "evaluate.every=15", f"data.dev={world['dev']}",
        "objective.cross_entropy=1", "objective.noise_attention=0.1", "objective.noise_mel=0.1", "optim.ema=0.5",
    )  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    first = records(tmp_path)[0]
    parts = {"logits", "encoder", "attention", "gate", "silence", "cross_entropy", "noise_attention", "noise_mel"}
    assert {key.removeprefix("loss/") for key in first if key.startswith("loss/")} == parts
    assert 0 <= first["wait"] <= 1 and first["samples_per_second"] > 0 and first["norm"] > 0
    assert {"rate/new", "rate/old", "rate/new_no_decay", "rate/old_no_decay"} <= set(first)
    assert [line["step"] for line in records(tmp_path, "wer/noisy")] == [0, 15, 30]
    for name in ("best.safetensors", "last.safetensors"):
        assert load_model(tmp_path / name, device="cpu").dual is not None
        assert read_config(tmp_path / name)["recipe"]["recipe"]["loop"]["steps"] == 30
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_equal_one_with_twice_the_batch(world: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("data.batch_size=2", "loop.steps=3", "objective.cross_entropy=0.5", *QUIET)
    two = command(world, tmp_path / "two", *overrides, processes=2)
    subprocess.run(two, env=environment(), check=True, capture_output=True)
    one = run(world, tmp_path / "one", *overrides, "data.batch_size=4")
    assert curve(tmp_path / "two") == pytest.approx(one, rel=1e-4)
    assert len(set(one)) == 3
    graph = run_in_two(world, tmp_path / "graph", *overrides, "loop.graph=true")
    assert graph == pytest.approx(one, rel=1e-4)


def test_accumulation_equals_a_larger_batch(world: dict[str, Path], tmp_path: Path) -> None:
    four = world["train"].parent / "four.jsonl"  # so that a step is an epoch, in whatever order
    four.write_text("\n".join(world["train"].read_text().splitlines()[:4]) + "\n")
    overrides = (
        "loop.steps=3",
        "objective.cross_entropy=0.5",
        "data.targets.timestamps=0",
        f"data.train={four}",
        *QUIET,
    )
    accumulated = run(world, tmp_path / "two", *overrides, "data.batch_size=2", "loop.accumulate=2")
    one = run(world, tmp_path / "one", *overrides, "data.batch_size=4", "loop.gradient_checkpointing=true")
    assert accumulated == pytest.approx(one, rel=1e-4)


def test_sharding_equals_one_process(world: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("data.batch_size=2", "loop.steps=3", "evaluate.every=3", f"data.dev={world['dev']}", *QUIET)
    two = run_in_two(world, tmp_path / "two", *overrides, "loop.fsdp=true")
    one = run(world, tmp_path / "one", *overrides, "data.batch_size=4")
    assert two == pytest.approx(one, rel=1e-4)
    a, b, start = (
        load_model(path, device="cpu").encoder.blocks[0].mlp[0].weight
        for path in (tmp_path / "one/last.safetensors", tmp_path / "two/last.safetensors", world["model"])
    )
    assert (a - b).norm() < 0.05 * (a - start).norm()


def test_killed_and_resumed_gives_the_same_curve(
    world: dict[str, Path], unbroken: tuple[Path, list[float]], tmp_path: Path
) -> None:
    overrides = ("loop.steps=8", "loop.save_every=2")
    # it would go on for much longer, but gets no chance to end in order
    process = subprocess.Popen(
        command(world, tmp_path, *overrides), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(curve_so_far(tmp_path)) >= 3, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(world, tmp_path, *overrides, "resume=auto") == unbroken[1]
    assert curve(tmp_path, "gate/noisy") == curve(unbroken[0], "gate/noisy")


def curve_so_far(out: Path) -> list[str]:
    return [line for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def wait_for(condition: Any, process: subprocess.Popen[Any] | None = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_sigterm_saves_and_exits(world: dict[str, Path], unbroken: tuple[Path, list[float]], tmp_path: Path) -> None:
    def terminate() -> None:
        wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(curve_so_far(tmp_path)) >= 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    code = train.main(arguments(world, tmp_path, "loop.steps=8"))
    thread.join()
    assert code == train.STOPPED
    done = len(curve(tmp_path))
    assert 2 <= done < 8
    assert [path.name for path in tmp_path.glob("checkpoint-*.pt")] == [f"checkpoint-{done:07d}.pt"]
    assert run(world, tmp_path, "loop.steps=8", "resume=auto") == unbroken[1]


def test_early_stop_and_the_last_checkpoints(world: dict[str, Path], tmp_path: Path) -> None:
    run(
        world, tmp_path, "loop.steps=9", "evaluate.every=1", "evaluate.patience=2", f"data.dev={world['dev']}",
        "evaluate.clips=1", "evaluate.per_clip=1", "loop.save_every=1", "loop.keep=2",
    )  # fmt: skip
    rates = curve(tmp_path, "wer/noisy")[1:]  # of steps 1, 2, ...
    assert len(rates) < 9 and min(rates[-2:]) >= min(rates[:-2])
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*.pt"))
    assert kept == [f"checkpoint-{step:07d}.pt" for step in (len(rates) - 1, len(rates))]


def test_snapshots_by_minutes_hold_a_model(world: dict[str, Path], tmp_path: Path) -> None:
    run(
        world, tmp_path, "loop.steps=3", "loop.save_minutes=1e-6", "loop.save_every=100", "loop.keep=9", "optim.ema=0.5"
    )
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*.pt"))
    assert kept == [f"checkpoint-{step:07d}.pt" for step in (1, 2, 3)]
    assert read_config(tmp_path / "last.safetensors")["recipe"]["step"] == 3


def test_branches_held_alone_and_expected_errors(world: dict[str, Path], tmp_path: Path) -> None:
    run(
        world, tmp_path, "loop.steps=2", "objective.primary=1", "objective.hold_primary=0.5", "objective.risk=1",
        "objective.hold_secondary=0.5", "objective.risk_samples=2", "augment.shaped=1", "augment.vary_prob=1",
    )  # fmt: skip
    for line in records(tmp_path):
        assert math.isfinite(line["loss/risk"]) and math.isfinite(line["loss/primary"])
        assert line["loss/sampled_errors"] >= 0


def test_a_damaged_checkpoint_is_refused(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "checkpoint-0000002.pt"
    path.write_bytes(b"PK not a checkpoint")
    assert train.main(arguments(world, tmp_path, f"resume={path}")) == 1
    error = capsys.readouterr().err
    assert "damaged" in error and error.count("\n") == 1


def test_a_run_is_not_overwritten(world: dict[str, Path], unbroken: tuple[Path, list[float]], capsys: Any) -> None:
    assert train.main(arguments(world, unbroken[0])) == 1
    assert "resume=auto" in capsys.readouterr().err


def test_resume_on_other_devices(world: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("data.batch_size=2", "evaluate.every=0", *QUIET)
    whole = run(world, tmp_path / "whole", *overrides, "data.batch_size=4")
    run(world, tmp_path / "part", *overrides, "data.batch_size=4", "loop.steps=4", "loop.save_every=2", "loop.keep=9")
    (tmp_path / "part/checkpoint-0000004.pt").unlink()
    assert run_in_two(world, tmp_path / "part", *overrides, "resume=auto") == pytest.approx(whole, rel=1e-4)


def poison(monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
    """The objective becomes NaN at these calls."""
    original, count = Student.score, iter(range(10**9))

    def score(self: Student, *args: Any) -> Any:
        loss, report = original(self, *args)
        return (loss * float("nan") if next(count) in calls else loss), report

    monkeypatch.setattr(Student, "score", score)


def test_a_step_that_is_not_finite_is_skipped(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(1, 2))
    run(world, tmp_path / "a", "loop.steps=3")
    assert [line["skipped"] for line in records(tmp_path / "a", "skipped")] == [0, 1, 1]
    model = load_model(tmp_path / "a/last.safetensors", device="cpu")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_many_such_steps_end_the_run(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison(monkeypatch, range(1, 100))
    assert train.main(arguments(world, tmp_path, "loop.steps=20", "loop.max_bad_steps=3")) == 1
    assert "3 steps in a row" in capsys.readouterr().err
    assert len(curve(tmp_path)) == 4


@pytest.mark.parametrize("frozen", [["encoder", "primary"], ["encoder"], ["secondary"]])
def test_freezing_changes_only_the_rest(world: dict[str, Path], tmp_path: Path, frozen: list[str]) -> None:
    run(world, tmp_path, "loop.steps=2", f"freeze=[{', '.join(frozen)}]")
    state = torch.load(tmp_path / "checkpoint-0000002.pt", weights_only=True)["student"]
    start = load_model(world["model"], device="cpu").state_dict()
    changed = {name.removeprefix("model.") for name in state if "model." in name}
    changed = {name for name in changed if name in start and not torch.equal(state[f"model.{name}"], start[name])}
    parts = {name.split(".")[0] for name in changed}
    assert parts == {"encoder", "decoder"} - {"decoder" if part == "primary" else part for part in frozen}
    gate = state["model.decoder.blocks.0.gate.2.weight"]
    assert bool(gate.any()) == ("secondary" not in frozen)


def test_the_branches_hear_apart(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the secondary branch hears through the cleaner, the primary does not, and both learn."""
    monkeypatch.setattr("dawhisper.noise.augment.load_deepfilternet", lambda device="cpu": lambda x, span: x * 0)
    monkeypatch.setattr("dawhisper.noise.augment.weights_path", lambda: None)
    heard: list[torch.Tensor] = []
    encode = AudioEncoder.forward

    def listen(self: AudioEncoder, mel: torch.Tensor, *rest: Any) -> Any:
        heard.append(mel)
        return encode(self, mel, *rest)

    monkeypatch.setattr(AudioEncoder, "forward", listen)
    apart = ("augment.cleaned_prob=1", "augment.cleaned_mix=[1,1]", "augment.cleaned_apart=1")
    losses = run(world, tmp_path, *apart, "model.branch.memory_layers=-1", "loop.steps=3")
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    both = [mel for mel in heard if mel.shape[1] == 160]  # the teacher hears 80 bands
    assert len(both) == 3 and all(mel[:, :80].std() > 0.1 and mel[:, 80:].std() == 0 for mel in both)


def test_the_distil_recipe_takes_a_dual_teacher(world: dict[str, Path], tmp_path: Path) -> None:
    """configs/distil.yaml as it is, on a small dual model with base's number of layers."""
    torch.manual_seed(1)
    dual = DualOptions(memory_layers=1, init="random")
    teacher = Whisper(ModelDimensions(80, 100, 32, 2, 2, 51865, 64, 32, 2, 6), dual)
    save_model(teacher, tmp_path / "teacher.safetensors", dtype="fp32")
    [_, *overrides] = arguments(world, tmp_path / "out", f"model.name={tmp_path / 'teacher.safetensors'}")
    recipe = str(ROOT / "configs/distil.yaml")
    assert train.main([recipe, *overrides, "loop.steps=2", f"data.dev={world['dev']}", "evaluate.every=2"]) == 0
    assert len(curve(tmp_path / "out")) == 2
    student = load_model(tmp_path / "out" / "last.safetensors", device="cpu")
    assert student.dual == teacher.dual
    assert (student.dims.n_audio_layer, student.dims.n_text_layer) == (2, 2)
    kept, given = student.state_dict(), teacher.state_dict()
    same = {
        name for name in kept if kept[name].shape == given[name].shape and kept[name].half().equal(given[name].half())
    }
    assert {name for name in kept if name.startswith("encoder.")} | {"decoder.token_embedding.weight"} <= same
    assert not any(name.endswith("query.weight") and name.startswith("decoder.") for name in same)


def test_distillation_to_fewer_layers(world: dict[str, Path], tmp_path: Path) -> None:
    losses = run(world, tmp_path, "model.decoder_layers=[0, 2]", "loop.steps=6")
    model = load_model(tmp_path / "last.safetensors", device="cpu")
    assert (model.dims.n_text_layer, model.dims.n_audio_layer) == (2, 3)
    assert losses[-1] < losses[0]


def test_shrunk_layers_are_the_chosen_ones(world: dict[str, Path]) -> None:
    model = load_model(world["model"], device="cpu")
    small = shrink(model, None, [2, 0])
    assert torch.equal(small.decoder.blocks[0].mlp[0].weight, model.decoder.blocks[2].mlp[0].weight)
    assert torch.equal(small.decoder.blocks[1].mlp[0].weight, model.decoder.blocks[0].mlp[0].weight)
    assert torch.equal(small.encoder.conv1.weight, model.encoder.conv1.weight)
    model.add_second_branch(DualOptions(memory_layers=2))
    small = shrink(model, [0, 2], None)
    own = "encoder.secondary_blocks.0.mlp.0.weight"
    assert torch.equal(small.state_dict()[own], model.state_dict()[own])
    with pytest.raises(OptionError, match="fewer layers than the 2"):
        shrink(model, [0], None)


def test_single_branch(world: dict[str, Path], tmp_path: Path) -> None:
    run(world, tmp_path, "model.dual=false", "objective.gate=0", "objective.silence=0", "loop.steps=2")
    model = load_model(tmp_path / "last.safetensors", device="cpu")
    assert model.dual is None and not model.knows_silence
    assert "gate/noisy" not in records(tmp_path)[0]


def test_variable_context_is_recorded(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, original = [], Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, inputs: heard.append(inputs.mel.shape[-1]) or original(self, inputs)
    )
    write = world["train"].parent / "short.jsonl"
    lines = [json.loads(line) for line in world["train"].read_text().splitlines()]
    # half a second of each: with the second after it three quarters of the model's two
    write.write_text(
        "\n".join(json.dumps(line | {"start": 0.2, "end": 0.7, "duration": 0.5}) for line in lines[:2]) + "\n"
    )
    run(
        world, tmp_path, "loop.variable_ctx=0.5", "loop.ctx_multiple=15", "loop.steps=8", "data.batch_size=1",
        f"data.train={write}", "augment.speed_prob=0",
    )  # fmt: skip
    assert set(heard) == {150, 200}
    model = load_model(tmp_path / "last.safetensors", device="cpu")
    assert model.variable_audio_ctx and model.knows_silence


def test_a_recipe_leaves_whispers_own_weights_alone(world: dict[str, Path], tmp_path: Path) -> None:
    [_, *overrides] = arguments(world, tmp_path, "loop.ctx_multiple=10", "loop.steps=4", "optim.warmup=1")
    assert train.main([str(ROOT / "configs/whisper_at_rest.yaml"), *overrides]) == 0
    model, start = (load_model(f, device="cpu") for f in (tmp_path / "last.safetensors", world["model"]))
    assert model.dual == DualOptions(memory_layers=3)
    weights = model.state_dict()
    assert all(torch.equal(weights[name].half(), value.half()) for name, value in start.state_dict().items())
    own = weights["encoder.secondary_blocks.0.mlp.0.weight"]
    assert not torch.equal(own, weights["encoder.blocks.0.mlp.0.weight"])


def test_bad_data_is_skipped_and_named(world: dict[str, Path], tmp_path: Path) -> None:
    folder = world["train"].parent
    write_wav(folder / "long.wav", np.random.default_rng(0).standard_normal(40 * 16000) * 0.1)
    (folder / "broken.wav").write_bytes(b"RIFF nothing that could be decoded")
    extra = [
        {"audio": "missing.wav", "duration": 1.0, "text": "one"},
        {"audio": "long.wav", "duration": 40.0, "text": "one"},
        {"audio": "broken.wav", "duration": 1.0, "text": "one"},
    ]
    manifest = folder / "bad.jsonl"
    manifest.write_text(world["train"].read_text() + "\n".join(json.dumps(line) for line in extra) + "\nnot json\n")
    run(world, tmp_path, f"data.train={manifest}", "loop.steps=6")
    dropped = {Path(json.loads(line)["what"]).name for line in (tmp_path / "dropped.jsonl").read_text().splitlines()}
    assert dropped == {"missing.wav", "long.wav", "broken.wav", "bad.jsonl:16"}
    assert records(tmp_path)[-1]["dropped"] == 4


def test_an_empty_manifest_stops_at_once(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert train.main(arguments(world, tmp_path / "out", f"data.train={tmp_path / 'empty.jsonl'}")) == 1
    error = capsys.readouterr().err
    assert "empty" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dry_run(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    assert train.main(arguments(world, tmp_path / "out", "dry_run=true", "loop.steps=1000")) == 0
    shown = capsys.readouterr().out
    assert "step 2:" in shown and "step 3:" not in shown and "samples/s" in shown and "GiB of memory" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR")]
)
def test_out_of_memory_says_what_to_lower(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: RuntimeError
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(Student, "score", fail)
    assert train.main(arguments(world, tmp_path)) == 1
    told = capsys.readouterr().err
    assert "data.batch_size (now 4" in told and "gradient_checkpointing" in told and told.count("\n") == 1
    assert "loop.memory_share" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("model.name=/nowhere.pt", "/nowhere.pt"),
        ("resume=/nowhere.pt", "no checkpoint at /nowhere.pt"),
        ("loop.precision=fp16", "needs a GPU"),
        ("model.decoder_layers=[0, 7]", "layers 0 to 2"),
        ("model.branch.memory_layers=9", "the encoder has 3 layers"),
        ("augment.cleaned_apart=0.5", "set model.branch.memory_layers=-1"),
        ("loop.fsdp=true", "torchrun"),
    ],
)
def test_errors_are_one_line(world: dict[str, Path], tmp_path: Path, capsys: Any, override: str, told: str) -> None:
    assert train.main(arguments(world, tmp_path / "out", override)) == 1
    error = capsys.readouterr().err
    assert error.startswith("train: error: ") and told in error and error.count("\n") == 1
