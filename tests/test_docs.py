"""Every command of the documents is parsed, and those of README, transcribe.md and adapt.md are run on small data.

`base` is replaced by a real model from the weights folder (tiny.en, or base where a language is asked for), training
is cut to one step; nothing is installed or fetched.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_cli import write_wav
from test_transcribe import noise

import train
from dawhisper import cli, load_audio

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RUN = ("README.md", "transcribe.md", "adapt.md")
ELSEWHERE = ("serve", "stream", "bench")  # run by tests of their own: they end with a signal, or take long
SMALL = [
    *("device=cpu", "loop.steps=1", "loop.compile=off", "data.batch_size=1", "data.workers=0", "optim.warmup=1"),
    *(
        "evaluate.kinds=white",
        "evaluate.clips=1",
        "evaluate.per_clip=1",
        "evaluate.max_tokens=4",
        "objective.encoder=0",
    ),
]


def commands(path: Path) -> list[str]:
    """The lines of the fenced bash blocks; what stands behind the installation in the same line counts too."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in re.split(r"&&| \| ", line)]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


def arguments(line: str, program: str) -> list[str] | None:
    """The words behind a program's name, None for another program's line."""
    words = shlex.split(line)
    return words[words.index(program) + 1 :] if program in words else None


def test_documents_have_commands() -> None:
    assert {path.name for path in DOCUMENTS} >= {*RUN, "serve.md", "compare.md"}
    assert all(commands(path) for path in DOCUMENTS if path.name != "compare.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handlers = [name for name in vars(cli) if re.fullmatch(r"_[a-z]+", name) and f"{name}_parser" in vars(cli)]
    for name in handlers:
        monkeypatch.setattr(cli, name, lambda **options: 0)
    for line in commands(path):
        words = arguments(line, "dawhisper")
        if words is not None and f"_{words[0]}" in handlers:
            assert cli.main(words) == 0, line
        if (words := arguments(line, "train.py")) is not None:
            assert (ROOT / words[0]).is_file(), line


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8")):
            if target != "azerbaijani.md" or (ROOT / "docs" / target).exists():
                assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the documents speak of."""
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copytree(ROOT / "assets", folder / "assets")
    speech = load_audio(ROOT / "assets" / "speech.opus")
    for name in ("recording.wav", "talk.wav"):
        write_wav(folder / name, speech[:32000])
    for name in ("speech", "recordings", "SOURCE"):
        for i in range(4):  # a folder for each speaker
            (folder / name / str(i)).mkdir(parents=True)
            write_wav(folder / name / str(i) / "clip.wav", speech[i * 8000 : 32000 + i * 8000])
            if name != "recordings":
                (folder / name / str(i) / "clip.txt").write_text("modern printers understand this")
    for name in ("noise", "NOISE_FOLDER"):
        (folder / name).mkdir()
        write_wav(folder / name / "hum.wav", 0.3 * noise(3))
    line = '{"audio": "recording.wav", "text": "modern printers understand", "language": "en", "duration": 2.0}\n'
    for name in ("MANIFEST", "train.jsonl"):
        (folder / name).write_text(line * 2)
    (folder / "DIR").mkdir()
    return folder


@pytest.mark.parametrize("name", RUN)
@pytest.mark.timeout(600)
def test_commands_run(
    name: str, place: Path, tiny_en_path: Path, base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    path = ROOT / name if name == "README.md" else ROOT / "docs" / name
    for line in commands(path):
        model = base_path if {"translate", "fr"} & set(line.split()) else tiny_en_path
        if (words := arguments(line, "dawhisper")) is not None:
            if words[0] in ELSEWHERE:
                continue
            words = [str(model) if word == "base" else word for word in words]
            if words[0] == "transcribe" and "--model" not in words:
                words += ["--model", str(model)]
            if words[0] == "visualize" and "--model" not in words:
                words += ["--model", str(model)]
            if words[0] == "evaluate":
                words += ["--limit", "1", "--bootstrap-samples", "10", "--snr", "0", "--kinds", "clean", "white"]
            assert cli.main(words) == 0, line
        elif (words := arguments(line, "train.py")) is not None:
            small = [f"model.name={tiny_en_path}", *SMALL]
            assert train.main([str(ROOT / words[0]), *words[1:], *small]) == 0, line
    if name == "adapt.md":
        assert (place / "runs/base_noise/best.safetensors").is_file()
    if name == "transcribe.md":
        assert (place / "out" / "recording.srt").is_file()
        assert (place / "onnx" / "decoder.onnx").is_file()
