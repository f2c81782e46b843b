"""Many files in one call: a fault in one is one line, outputs have names of their own, any console shows the text."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import QUICK, error_lines, run
from helpers.models import pair, save_openai
from helpers.sound import noise, write_wav

import dawhisper.transcribe_files
from dawhisper.media import Media
from dawhisper.transcribe_files import WriterOptions, write_outputs
from dawhisper.transcription import Segment, Transcription
from dawhisper.writers import WRITERS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    ours, _ = pair(most=40)
    return str(save_openai(ours, tmp_path_factory.mktemp("model") / "random.pt"))


def segment(text: str, **other: object) -> Segment:
    fields = {"id": 0, "seek": 0, "start": 0.0, "end": 1.0, "text": text, "tokens": [1], "temperature": 0.0}
    measures = {"avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    return Segment(**{**fields, **measures, **other})  # type: ignore[arg-type]


# ---- a file that fails never takes the others with it


@pytest.mark.parametrize("batch", [[], ["--batch_size", "2"]])
def test_an_unforeseen_error_in_a_decoder_is_one_line(
    batch: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Media.blocks

    def broken(self: Media, sr: int, origin: float = 0.0):
        if "bad" in self.name:
            raise KeyError("a surprise\nof two lines")
        return whole(self, sr, origin)

    monkeypatch.setattr(Media, "blocks", broken)
    clips = [write_wav(tmp_path / f"{name}.wav", noise(2)) for name in ("first", "bad", "last")]
    assert run("transcribe", *clips, "--model", model, "-o", tmp_path / "o", "-f", "txt", *batch, *QUICK) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = error_lines(err)
    assert "bad.wav: unexpected KeyError" in line and "DAWHISPER_TRACEBACK=1" in line
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["first.txt", "last.txt"]

    monkeypatch.setenv("DAWHISPER_TRACEBACK", "1")
    assert run("transcribe", clips[1], "--model", model, "-o", tmp_path / "o", "-f", "txt", *batch, *QUICK) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_error_in_a_batch_is_of_one_recording(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [write_wav(tmp_path / f"{i}.wav", noise(2, seed=i) * (i != 1)) for i in range(3)]
    write_wav(clips[1], np.full(32000, 0.5))
    hear = dawhisper.batched.hear_batch

    def broken(model, batch, options):
        if any((job.chunk.samples == 0.5).mean() > 0.5 or job.chunk.samples.std() < 1e-3 for job in batch):
            raise RuntimeError("out of memory")
        return hear(model, batch, options)

    monkeypatch.setattr("dawhisper.batched.hear_batch", broken)
    out = tmp_path / "o"
    assert run("transcribe", *clips, "--model", model, "-o", out, "-f", "txt", "--batch_size", 3, *QUICK) == 1
    (line,) = error_lines(capsys.readouterr().err)
    assert "1.wav: unexpected RuntimeError: out of memory" in line
    assert sorted(p.name for p in out.iterdir()) == ["0.txt", "2.txt"]


def test_an_unforeseen_error_in_a_writer_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(result: Transcription, name: str, folder: Path, writing: WriterOptions) -> None:
        if name == "first":
            raise KeyError("words")
        write_outputs(result, name, folder, writing)

    monkeypatch.setattr("dawhisper.transcribe_files.write_outputs", broken)
    clips = [write_wav(tmp_path / f"{name}.wav", noise(2)) for name in ("first", "last")]
    assert run("transcribe", *clips, "--model", model, "-o", tmp_path / "o", "-f", "srt", *QUICK) == 1
    (line,) = error_lines(capsys.readouterr().err)
    assert "the output of" in line and "first.wav" in line
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["last.srt"]


# ---- many files


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_tree_of_files_and_a_summary(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out, summary = tmp_path / "in", tmp_path / "out", tmp_path / "summary.jsonl"
    (root / "sub").mkdir(parents=True)
    write_wav(root / "a.wav", noise(2))
    write_wav(root / "sub" / "a.wav", noise(3))
    (root / "sub" / "bad.mp3").write_text("no sound")
    call = ["transcribe", root, "--recursive", "--model", model, "-o", out, "-f", "txt", "--summary", summary]
    assert run(*call, *QUICK, "--batch-size", 2, "--skip-existing") == 1
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == ["a.txt", "sub/a.txt"]
    err = capsys.readouterr().err
    assert "2 of 3 files done, 1 failed: 0.00 h of audio" in err and "times real time" in err
    assert err.count("bad.mp3: ") == 2  # when it fails, and at the end
    *each, end = lines(summary)
    assert {(Path(line["audio"]).name, line["output"], line["status"], line["duration"]) for line in each} == {
        ("a.wav", "a", "done", 2.0),
        ("a.wav", "sub/a", "done", 3.0),
        ("bad.mp3", "sub/bad", "failed", 0.0),
    }
    assert "bad.mp3: " in next(line["error"] for line in each if line["status"] == "failed")
    assert (end["files"], end["done"], end["failed"], end["hours"]) == (3, 2, 1, round(5 / 3600, 4))

    (root / "sub" / "bad.mp3").unlink()
    (out / "sub" / "a.txt").unlink()
    assert run(*call, *QUICK, "--skip-existing") == 0
    assert "1 of 2 files done, 1 skipped" in capsys.readouterr().err
    assert run(*call[:-1], tmp_path / "none" / "x.jsonl", *QUICK) == 1
    assert "choose another with --summary" in error_lines(capsys.readouterr().err)[0]
    assert run(*call[:-4], *QUICK, "--skip-existing", "--model", tmp_path / "none", "-f", "txt") == 0  # nothing to load


def test_each_file_as_its_row_says(model: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", noise(2))
    table = tmp_path / "m.csv"
    table.write_text("audio,language,name\na.wav,de,talks/first\nb.wav,,\n")
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        given = ["--model", model, "-o", out, "-f", "json", "--shard", f"{number}/2"]
        assert run("transcribe", table, *given, *QUICK) == 0
    assert json.loads((tmp_path / "out1/talks/first.json").read_text())["language"] == "de"
    assert json.loads((tmp_path / "out2/b.json").read_text())["language"] == "en"
    assert not (tmp_path / "out1/b.json").exists()


def test_a_process_for_each_device(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        write_wav(tmp_path / f"{i}.wav", noise(1 + i))
    files = [tmp_path / f"{i}.wav" for i in range(4)]
    given = ["--model", model, "-f", "txt", "--batch_size", 2, "--dtype", "fp32", *QUICK[:-2]]
    assert run("transcribe", *files, "none.wav", *given, "-o", tmp_path / "two", "--device", "cpu,cpu") == 1
    captured = capsys.readouterr()
    assert error_lines(captured.err) == ["dawhisper: error: none.wav: no such file; check the name and the folder"]
    assert f"{files[3]}: 4.0 s, 3" in captured.out.splitlines()
    assert run("transcribe", *files, *given, "-o", tmp_path / "one", "--device", "cpu") == 0
    assert [p.name for p in sorted((tmp_path / "two").iterdir())] == [f"{i}.txt" for i in range(4)]
    for path in (tmp_path / "one").iterdir():
        assert path.read_text() == (tmp_path / "two" / path.name).read_text()


def test_outputs_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("words")

    monkeypatch.setattr(WRITERS["json"], "write_result", broken)  # the last of all formats
    with pytest.raises(KeyError):
        write_outputs(Transcription(" a", [segment(" a")], "en"), "sub/x", tmp_path, WriterOptions())
    assert [p.name for p in tmp_path.rglob("*")] == ["sub"]


# ---- outputs


def test_text_is_escaped_in_vtt_alone(tmp_path: Path) -> None:
    said = " 1 < 2 & 3 > 2 --> so <b>"
    words = [dawhisper.Word(word, i, i + 1, 0.9) for i, word in enumerate([" a<b", " &", " c-->d"])]
    for name, given in (("plain", segment(said)), ("words", segment(" a<b & c-->d", words=words))):
        write_outputs(Transcription(given.text, [given], "en"), name, tmp_path, WriterOptions())
    assert "1 &lt; 2 &amp; 3 &gt; 2 --&gt; so &lt;b&gt;" in (tmp_path / "plain.vtt").read_text()
    assert "a&lt;b &amp; c--&gt;d" in (tmp_path / "words.vtt").read_text()
    assert "1 < 2 & 3 > 2 -> so <b>" in (tmp_path / "plain.srt").read_text()
    assert said.strip() in (tmp_path / "plain.txt").read_text()
    write_outputs(
        Transcription(said, [segment(" a<b", words=words[:1])], "en"), "u", tmp_path, WriterOptions("vtt", True)
    )
    assert "<u>a&lt;b</u>" in (tmp_path / "u.vtt").read_text()


# ---- consoles


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_a_console_of_any_encoding(encoding: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model says words of many scripts, and so does the help."""
    clip = write_wav(tmp_path / "\u4f60\u597d.wav", noise(3))
    for command in (
        ["transcribe", clip, "--model", model, "-o", tmp_path / "o", *QUICK, "--language", "ru"],
        ["transcribe", "--help"],
    ):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert run(*command) == 0
        out.flush()
        assert "Traceback" not in err.buffer.getvalue().decode(encoding) and len(out.buffer.getvalue()) > 50
    text = (tmp_path / "o" / "\u4f60\u597d.srt").read_bytes().decode("utf-8")
    assert any(ord(letter) > 127 for letter in text)  # there was something to lose


def test_text_shown_from_python(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    dawhisper.load_model(model, device="cpu", dtype="fp32").transcribe(
        noise(2), verbose=True, language="ru", beam_size=None
    )
    assert latin.buffer.getvalue()


# ---- numbers


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--temperature", "inf"],
        ["--threads", "-3"],
        ["--threads", "1000000"],
        ["--clip_timestamps", "nan"],
        ["--clip_timestamps", "0,inf"],
        ["--clip_timestamps=-1,2"],
        ["--clip_timestamps", "3,2"],
        ["--clip_timestamps", "1e400"],
        ["--no_speech_threshold", "nan"],
        ["--logprob_threshold=-inf"],
        ["--compression_ratio_threshold", "nan"],
        ["--temperature_increment_on_fallback", "1e-12"],
        ["--temperature_increment_on_fallback", "nan"],
        ["--hallucination_silence_threshold", "nan", "--word_timestamps", "True"],
        ["--length_penalty", "nan"],
        ["--patience", "nan"],
        ["--beam_size", "-1"],
        ["--best_of", "0"],
        ["--batch_size", "-2"],
        ["--audio_track", "0"],
        ["--max_line_width", "-5", "--word_timestamps", "True"],
        ["--max_words_per_line", "-1", "--word_timestamps", "True"],
        ["--max_line_count", "0", "--word_timestamps", "True"],
        ["--suppress_tokens", "99999999"],
        ["--suppress_tokens", "1,x"],
    ],
    ids=" ".join,
)
def test_impossible_numbers_are_one_line(
    flags: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_wav(tmp_path / "clip.wav", noise(1))
    beams = [] if "--patience" in flags or "--best_of" in flags else ["--beam_size", "None"]
    args = ["--language", "en", "--device", "cpu", *beams, *flags]
    assert run("transcribe", clip, "--model", model, "-o", tmp_path / "o", "-f", "txt", *args) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and "unexpected" not in err
    assert len(error_lines(err)) == 1
