"""The command line: outputs, flags, and what bad input gets."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import QUICK, error_lines, run
from helpers.models import pair, save_openai
from helpers.sound import noise, write_wav

from dawhisper.checkpoint import load_model
from dawhisper.model import Whisper
from dawhisper.transcribe_files import fallback_temperatures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random checkpoint in OpenAI's format."""
    ours, _ = pair(most=20)
    return str(save_openai(ours, tmp_path_factory.mktemp("model") / "random.pt"))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "clip.wav", noise(3))


def test_writes_every_format(model: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert run("transcribe", clip, "--model", model, "-o", out, "--word_timestamps", "True", *QUICK) == 0
    assert sorted(p.name for p in out.iterdir()) == [f"clip.{f}" for f in ("json", "srt", "tsv", "txt", "vtt")]
    result = json.loads((out / "clip.json").read_text())
    assert result["language"] == "en"
    assert result["segments"][0]["words"]
    assert result["segments"][0]["text"].strip() in capsys.readouterr().out


def test_one_format(model: str, clip: Path, tmp_path: Path) -> None:
    assert run("transcribe", clip, "--model", model, "-o", tmp_path / "o", "-f", "srt", *QUICK) == 0
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["clip.srt"]


def bad_files(folder: Path) -> dict[str, Path]:
    text, empty = folder / "text.wav", folder / "empty.mp3"
    text.write_text("not audio\n" * 100)
    empty.touch()
    return {
        "missing": folder / "nowhere.wav",
        "empty": empty,
        "text": text,
        "no samples": write_wav(folder / "none.wav", np.zeros(0)),
    }


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "no samples"])
def test_a_bad_file_is_one_line_and_the_others_go_on(
    kind: str, model: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_files(tmp_path)[kind]
    out = tmp_path / "out"
    assert run("transcribe", bad, clip, "--model", model, "-o", out, "-f", "txt", *QUICK) == 1
    err = capsys.readouterr().err
    assert len(error_lines(err)) == 1, err
    assert bad.name in err
    assert "Traceback" not in err
    assert [p.name for p in out.iterdir()] == ["clip.txt"]


def test_unusual_but_good_files(model: str, tmp_path: Path) -> None:
    one = write_wav(tmp_path / "one.wav", np.full(1, 0.5))
    many = write_wav(tmp_path / "many.wav", np.repeat(noise(2)[:, None], 8, axis=1), rate=96000)
    assert run("transcribe", one, many, "--model", model, "-o", tmp_path / "o", "-f", "json", *QUICK) == 0
    assert len(list((tmp_path / "o").iterdir())) == 2


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--language", "azerbajani"], 1, "did you mean azerbaijani"),
        (["--model", "smal"], 1, "small"),
        (["--model", "nowhere.pt"], 1, "nowhere.pt"),
        (["--device", "quantum"], 1, "quantum"),
        (["--max_line_width", "20"], 1, "--word_timestamps True"),
        (["--patience", "1.0", "--beam_size", "None"], 1, "patience needs beam_size"),
        (["--temperature_increment_on_fallback", "0"], 1, "above 0"),
        (["--clip_timestamps", "9,1"], 1, "go back"),
        (["--output_format", "doc"], 2, "doc"),
        (["--verbose", "maybe"], 2, "True or False"),
        (["--beem_size", "4"], 2, "beem_size"),
    ],
)
def test_wrong_arguments(
    args: list[str], code: int, says: str, model: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["transcribe", clip, "--model", model, "-o", tmp_path / "o", "--device", "cpu", *args]
    assert run(*given) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_a_wrong_checkpoint(clip: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(model).read_bytes()[:5000])
    assert run("transcribe", clip, "--model", cut, *QUICK) == 1
    (line,) = error_lines(capsys.readouterr().err)
    assert "cut.pt" in line


def test_an_unwritable_folder_is_said_before_the_work(
    model: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("transcribe", clip, "--model", model, "-o", tmp_path / "file" / "out", *QUICK) == 1
    captured = capsys.readouterr()
    assert "--output_dir" in captured.err
    assert captured.out == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_interrupt_keeps_what_was_transcribed(tmp_path: Path) -> None:
    long = write_wav(tmp_path / "long.wav", noise(1200))
    model = save_openai(pair()[0], tmp_path / "slow.pt")
    command = [sys.executable, "-m", "dawhisper", "transcribe", str(long), "--model", str(model), *QUICK, "-f", "json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "o")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells have it ignored
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first segment
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "interrupted" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "o" / "long.partial.json").read_text())["segments"]
    assert len(list((tmp_path / "o").iterdir())) == 1  # what is not whole has not the whole's name


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("dawhisper 0.")
    assert run() == 2
    assert run("transcribe") == 2
    assert run("transcribe", "--help") == 0


def test_inference_loads_no_training_package() -> None:
    training = (
        "torchaudio",
        "jiwer",
        "tensorboard",
        "matplotlib",
        "fastapi",
        "dawhisper.noise.augment",
        "dawhisper.evaluation.run",
    )
    code = f"import sys, dawhisper, dawhisper.transcribe_files; print([m for m in {training} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def test_fallback_temperatures() -> None:
    assert fallback_temperatures(0.0, 0.2) == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert fallback_temperatures(0.5, None) == (0.5,)


def test_the_flags_are_whispers(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of the `whisper` command, but for the model's own default."""
    run("transcribe", "--help")
    ours = capsys.readouterr().out
    from whisper.transcribe import cli

    flags = re.findall(r'add_argument\("--(\w+)"', inspect.getsource(cli))
    assert len(flags) > 30
    missing = [flag for flag in flags if f"--{flag}" not in ours]
    assert missing == []


def test_the_dtype_that_is_asked_for(model: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, device: str | None, dtype: str | None, root: str | None) -> Whisper:
        asked.append(dtype)
        return load_model(name, device, dtype, root)

    monkeypatch.setattr("dawhisper.transcribe_files.load_model", load)
    for args in ([], ["--fp16", "False"], ["--dtype", "bf16"], ["--dtype", "int8", "--fp16", "False"]):
        assert run("transcribe", clip, "--model", model, "-o", tmp_path / "o", "-f", "txt", *QUICK, *args) == 0
    assert asked == ["auto", "fp32", "bf16", "int8"]
