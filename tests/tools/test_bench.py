"""dawhisper bench, and the model in other packages' formats."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_line import run
from helpers.models import DUALS, VARIANTS, pair, save_openai
from helpers.sound import noise, write_wav

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.decoding import model_tokenizer
from dawhisper.errors import CheckpointError
from dawhisper.formats.huggingface import to_ctranslate2, to_transformers, transformers_tokenizer
from dawhisper.model import Whisper
from dawhisper.tools.bench import BenchClip, BenchOptions, Contestant, Part, compete, peak_memory
from dawhisper.tools.throughput import step_bytes

TEXT = " Hello, world: 12 naïve tests… salam, dünya!"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_of_transformers_holds_the_same_model(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = Whisper(VARIANTS[variant])
    to_transformers(model, tmp_path)
    again = dawhisper.load_model(tmp_path, device="cpu")
    assert again.dims == model.dims
    assert torch.equal(again.alignment_heads, model.alignment_heads)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", ["multilingual", "english"])
def test_its_tokenizer_is_whispers(variant: str) -> None:
    pytest.importorskip("transformers")
    tokenizer = model_tokenizer(Whisper(VARIANTS[variant]))
    theirs: Any = transformers_tokenizer(tokenizer)
    assert theirs(TEXT, add_special_tokens=False).input_ids == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert {t: theirs.convert_tokens_to_ids(t) for t in tokenizer.special_tokens} == tokenizer.special_tokens
    assert len(theirs) == VARIANTS[variant].n_vocab


def test_a_dual_model_stays_ours(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="second branch"):
        to_transformers(Whisper(VARIANTS["multilingual"], DUALS["plain"]), tmp_path)


def test_faster_whisper_hears_what_we_hear(tiny_en_path: Path, assets: Path, tmp_path: Path) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    pytest.importorskip("transformers")
    model = dawhisper.load_model(tiny_en_path, device="cpu")
    to_transformers(model, tmp_path / "transformers")
    to_ctranslate2(tmp_path / "transformers", tmp_path / "ctranslate2")
    theirs = faster_whisper.WhisperModel(str(tmp_path / "ctranslate2"), "cpu", compute_type="float32")
    clip = assets / "speech.opus"
    options = {"language": "en", "temperature": 0.0, "beam_size": 1}
    segments, _ = theirs.transcribe(load_audio(clip), **options)  # as bench: its own reader knows no PyAV from 19 on
    ours = model.transcribe(clip, **{**options, "beam_size": None}).text.lower().split()
    assert sum(a == b for a, b in zip(ours, "".join(s.text for s in segments).lower().split())) >= 0.8 * len(ours)


# -------------------------------------------------------------------------------------------------------- measuring


class Said:
    words = None

    def __init__(self, text: str, start: float = 0.0):
        self.text, self.start, self.end = text, start, start + 1


def test_contestants_take_turns_and_are_counted() -> None:
    calls: list[str] = []

    def runner(label: str, texts: dict[int, str], start: float) -> Any:
        def transcribe(job: Sequence[np.ndarray]) -> Iterator[Part]:
            calls.append(label)
            for place, audio in enumerate(job):
                yield place, Said(texts[len(audio)], start)

        return transcribe

    clips = [
        BenchClip(np.zeros(16000, np.float32), "alpha beta gamma"),
        BenchClip(np.zeros(32000, np.float32), "delta"),
    ]
    runners = {
        "a": runner("a", {16000: "Alpha beta gamma.", 32000: "delta"}, 0.0),
        "b": runner("b", {16000: "alpha gamma", 32000: "delta"}, 0.0),
        "c": runner("c", {16000: "Alpha beta gamma.", 32000: "delta"}, 0.25),
    }
    a, b, c = compete(runners, clips, BenchOptions())
    assert "".join(calls) == "abc" + "abc" + "bca"  # warm-up, and a turn for each recording
    assert (a.wer, b.wer, c.wer) == (0.0, 0.25, 0.0)
    assert (a.missing, b.missing, a.same_text, b.same_text) == (0, 1, 2, 1)
    assert (a.time_difference, b.time_difference, c.time_difference) == (0.0, None, 0.25)
    assert a.real_time_factor == pytest.approx(a.seconds / 3)
    calls.clear()
    compete(runners, clips, BenchOptions(batch_size=4, repeat=2))
    assert "".join(calls) == "abc" + "abc" + "bca"  # all recordings are one job


def test_bytes_of_a_step() -> None:
    model = Whisper(VARIANTS["multilingual"])
    one, two = step_bytes(model, 1, 0), step_bytes(model, 2, 0)
    assert two - one == 2 * 2 * 1500 * 64 * 4  # keys and values of two layers
    assert step_bytes(Whisper(VARIANTS["multilingual"], DUALS["plain"]), 2, 0) > two + 2 * (two - one) - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    ours, _ = pair(most=40)
    return str(save_openai(ours, tmp_path_factory.mktemp("model") / "random.pt"))


@pytest.fixture(scope="module")
def report(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench` writes, of two seconds beside openai-whisper."""
    folder = tmp_path_factory.mktemp("report")
    file = write_wav(folder / "0.wav", noise(2))
    given = ["--model", model, "--device", "cpu", "--threads", "1", "--against", "openai-whisper", "--dtype", "fp32"]
    with redirect_stdout(io.StringIO()) as shown:
        assert run("bench", file, *given, "--json", folder / "b.json", "--markdown", folder / "b.md") == 0
    assert all("| openai-whisper fp32 |" in text for text in (shown.getvalue(), (folder / "b.md").read_text()))
    return json.loads((folder / "b.json").read_text())


def test_peak_memory_is_that_of_its_own_process(model: str, report: dict[str, Any]) -> None:
    held = np.ones(1 << 29, np.uint8)  # half a GiB here must not count there
    with_it = peak_memory(Contestant("dawhisper", "fp32"), BenchOptions(model=model, device="cpu", threads=1), noise(2))
    assert len(held) == 1 << 29
    assert with_it == pytest.approx(report["sections"]["recordings"]["contestants"][0]["peak_gib"], abs=0.25)


def test_the_command_beside_openai_whisper(report: dict[str, Any]) -> None:
    ours, theirs = report["sections"]["recordings"]["contestants"]
    assert ours["texts"] == theirs["texts"]
    assert all(ours["texts"])
    assert theirs["same_text"] == 1
    assert theirs["time_difference"] < 0.01
    assert 0 < theirs["first_segment"] <= theirs["seconds"]
    assert 0 < ours["peak_gib"] < 8
    (stages,) = report["stages"]
    assert 0 < stages["step_share"] < 2
    assert 0 < stages["encoder_share"] < 2
    assert stages["step_ms"] > 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--against", "fast-whisper"], "did you mean faster-whisper"),
        (["--against", "openai-whisper:int8"], "fp32 or fp16, not int8"),
        (["--against", "openai-whisper", "openai-whisper"], "named twice"),
        (["nowhere.wav"], "nowhere.wav"),
        (["--model", "smal"], "small"),
    ],
)
def test_wrong_arguments(args: list[str], says: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = args if "--model" in args else [*args, "--model", model]
    assert run("bench", *given, "--device", "cpu") == 1
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
