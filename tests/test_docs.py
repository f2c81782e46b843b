"""Every command of README.md and docs/*.md is run as it stands, on small data, and their Python too.

`base`, and the model that a command takes where none is named, is replaced by a small random one: what each command
does with real ones its own tests show. `align`, which refuses a text that it doesn't hear, has dawhisper's. Training is
cut to one step. Nothing is installed or fetched: .ci/run does that with the README's lines. A line that can't be run
stands under <!-- not run by the tests: REASON -->.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.command_line import run_script
from helpers.models import MULTILINGUAL, save_openai, talkative
from helpers.server import launch
from helpers.sound import noise, write_wav
from helpers.training import SPEED

import train
from dawhisper import cli, load_audio
from dawhisper.model import Whisper
from dawhisper.serve import listen

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
INSTALLATION = (
    r"python3 -m venv \.venv",
    r"\. \.venv/bin/activate",
    r"pip install -c constraints.txt -e \S+",
    r"python -m pytest",
)
NOT_RUN = r"^<!-- not run by the tests: .+ -->\n```\w+\n.*?^```\n"
SMALL = [
    *("device=cpu", "loop.steps=1", "loop.compile=off", "data.batch_size=1", "data.workers=0", "optim.warmup=1"),
    *("evaluate.kinds=white", "evaluate.clips=1", "evaluate.per_clip=1", "evaluate.max_tokens=4"),
    "objective.encoder=0",
    *SPEED,
]


def runnable(path: Path) -> str:
    """A document without the lines that the tests can't run."""
    return re.sub(NOT_RUN, "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """The lines of the fenced bash blocks, but for the installation: parts of && and | apart, arrays filled in."""
    text = runnable(path)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found, arrays = [], {}
    for line in (line for block in blocks for line in block.splitlines() if line and not line.startswith("#")):
        if array := re.fullmatch(r"(\w+)=\((.*)\)", line):
            arrays[f'"${{{array[1]}[@]}}"'] = array[2]
            continue
        for name, value in arrays.items():
            line = line.replace(name, value)
        parts = [part.split("  #")[0].strip() for part in re.split(r"&&| \| ", line)]
        found += [part for part in parts if not any(re.fullmatch(known, part) for known in INSTALLATION)]
    return found


def test_no_table_holds_what_is_no_number() -> None:
    for path in [*DOCUMENTS, ROOT / "MODEL_CARD.md", *(ROOT / "docs" / "log").glob("*.md")]:
        wrong = [line for line in path.read_text("utf-8").splitlines() if re.search(r"\|.*\b[+-]?(nan|inf)\b%?", line)]
        assert not wrong, f"{path}: {wrong[0]}"


def test_documents_have_commands() -> None:
    assert {path.name for path in DOCUMENTS} >= {"README.md", "transcribe.md", "adapt.md", "serve.md", "compare.md"}
    without = ("architecture.md", "compare.md", "install.md", "results.md")
    assert all(commands(path) for path in DOCUMENTS if path.name not in without)


def test_ci_takes_both_commands_from_the_readme() -> None:
    found = re.findall(r"^python3 -m venv.*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [line.split(" && ")[2] for line in found] == [
        "pip install -c constraints.txt -e .",
        "pip install -c constraints.txt -e '.[test]'",
    ]
    assert "grep '^python3 -m venv' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_lock_has_every_package_that_the_project_names() -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    # diarize is not in `all`, which the lock is of
    requirements = [each for each in requires("dawhisper") or () if 'extra == "diarize"' not in each]
    named = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}
    assert named - {"dawhisper"} <= locked


def test_links_lead_somewhere() -> None:
    for path in [*DOCUMENTS, *ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *(ROOT / "docs" / "log").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.fixture(scope="module")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small multilingual model in OpenAI's format."""
    torch.manual_seed(0)
    small = replace(MULTILINGUAL, n_audio_layer=1, n_text_layer=1)
    model = talkative(Whisper(small).eval(), most=12)
    return save_openai(model, tmp_path_factory.mktemp("random") / "base.pt")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the documents speak of."""
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copytree(ROOT / "assets", folder / "assets", copy_function=os.symlink)
    speech = load_audio(ROOT / "assets" / "speech.opus")
    for name in ("recording.wav", "talk.wav"):
        write_wav(folder / name, speech[:32000])
    (folder / "text.txt").write_text("modern printers understand this")
    for name in ("speech", "recordings", "SOURCE"):
        for i in range(4):  # a folder for each speaker
            (folder / name / str(i)).mkdir(parents=True)
            write_wav(folder / name / str(i) / "clip.wav", speech[i * 8000 : 32000 + i * 8000])
            if name != "recordings":
                (folder / name / str(i) / "clip.txt").write_text("modern printers understand this")
            if name == "speech":
                shutil.copy(folder / name / str(i) / "clip.wav", folder / name / str(i) / "next.wav")
                (folder / name / str(i) / "next.txt").write_text("printers understand this")
    for name in ("noise", "noise_dev", "NOISE_FOLDER"):
        (folder / name).mkdir()
        write_wav(folder / name / "hum.wav", 0.3 * noise(3))
    line = '{"audio": "%s", "text": "modern printers understand", "language": "en", "duration": 2.0}\n'
    line %= folder / "recording.wav"
    (folder / "english_test").mkdir()
    for name in ("MANIFEST", "train.jsonl", "english_test/manifest.jsonl"):
        (folder / name).write_text(line * 2)
    (folder / "DIR").mkdir()
    azerbaijani(folder, speech[:32000])
    return folder


def azerbaijani(folder: Path, clip: np.ndarray) -> None:
    """Common Voice and FLEURS as they are unpacked, and sentences to be read by a synthesiser."""
    voice, fleurs = folder / "cv-corpus" / "az", folder / "fleurs" / "az_az"
    (voice / "clips").mkdir(parents=True)
    write_wav(voice / "clips" / "a.mp3", clip)
    columns = ("client_id", "path", "sentence", "locale")
    rows = [columns, ("speaker", "a.mp3", "Salam, dünya", "az")]
    (voice / "validated.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    for split in ("train", "dev", "test"):
        (fleurs / "audio" / split).mkdir(parents=True)
        write_wav(fleurs / "audio" / split / f"{split}.wav", clip)
        row = f"1\t{split}.wav\tMətn {split}.\tmətn {split}\tm ə t n |\t32000\tFEMALE\n"
        (fleurs / f"{split}.tsv").write_text(row, "utf-8")
    words = ["ev", "yol", "su", "dağ", "bağ", "çay", "ana", "ata", "dil", "söz", "gün", "ay", "il", "daş", "quş"]
    lines = [" ".join(words[(i * k) % 15] for k in range(1, 7)) + "." for i in range(1, 9)]
    for name, part in (("tatoeba_aze.txt", lines[:4]), ("ud_tuecl.txt", lines[4:])):
        (folder / name).write_text("\n".join(part), "utf-8")


class Reader:
    """Runs the commands of a document one after the other, as a reader would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: np.ndarray, converted: Path):
        self.monkeypatch, self.samples, self.converted = monkeypatch, samples, converted
        self.url = ""  # of the server, once there is one
        self.servers: list[subprocess.Popen[str]] = []

    def run(self, line: str, model: Path) -> None:
        words = shlex.split(line)
        if words[0] == "dawhisper":
            self.dawhisper(words[1:], model)
        elif "train.py" in words:
            self.train(words[words.index("train.py") + 1 :], model)
        elif words[0] == "curl":
            url = words.pop().replace("http://127.0.0.1:8000", self.url)
            answer = subprocess.run([*words, "-sf", url], check=True, capture_output=True, text=True).stdout
            assert "text" in answer
        elif words[0] == "python" and words[1].startswith("scripts/"):
            assert run_script(ROOT / words[1], *words[2:], "--dev", "1", "--test", "2") == 0
        elif words[0] != "ffmpeg":  # it only makes the samples for a pipe
            pytest.fail(f"nobody runs this command: {line}")

    def dawhisper(self, words: list[str], model: Path) -> None:
        if words[0] == "serve":
            self.serve([f"base={model}" if word == "base" else word for word in words[1:]])
            return
        words = [str(model) if word == "base" else word for word in words]
        if words[0] in ("transcribe", "visualize", "bench", "stream") and "--model" not in words:
            words += ["--model", str(model)]
        if words[0] == "evaluate":
            words += ["--limit", "1", "--bootstrap-samples", "10", "--snr", "0", "--kinds", "clean", "white"]
        if words[0] == "join":
            words += ["--seconds", "3", "29"]
        if words[0] == "quantize" and "--manifest" in words:
            words += ["--limit", "1"]
        if words[0] == "bench":
            words += ["--device", "cpu", "--threads", "1", "--converted", str(self.converted)]
        if words[0] == "stream":  # of all this only the microphone is not there
            data = (self.samples * 32767).astype("<i2").tobytes()
            self.monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
            self.monkeypatch.setattr(listen, "read_microphone", lambda device: iter([self.samples]))
        assert cli.main(words) == 0, words

    def train(self, words: list[str], model: Path) -> None:
        start = "teacher" if "stage2" in words[0] else "name"  # stage 2 starts from what stage 1 wrote
        shutil.rmtree(Path("runs") / Path(words[0]).stem, ignore_errors=True)
        assert train.main([str(ROOT / words[0]), *words[1:], f"model.{start}={model}", *SMALL]) == 0, words

    def serve(self, words: list[str]) -> None:
        server, line = launch(words)
        self.servers.append(server)
        self.url = line.split()[-1]
        assert self.url.startswith("http://")

    def leave(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) in (0, -signal.SIGTERM)


@contextmanager
def reader(monkeypatch: pytest.MonkeyPatch, place: Path) -> Iterator[Reader]:
    made = Reader(monkeypatch, load_audio(place / "recording.wav"), place / "converted")
    try:
        yield made
    finally:
        made.leave()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
@pytest.mark.timeout(600)
def test_commands_run(path: Path, place: Path, random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = commands(path)
    if shutil.which("espeak-ng") is None and any("synthetic" in line for line in lines):
        pytest.skip("espeak-ng is not installed")
    with reader(monkeypatch, place) as made:
        for line in lines:
            made.run(line, random_base)
    if path.name == "adapt.md":
        assert (place / "runs/base_noise/best.safetensors").is_file()
    if path.name == "transcribe.md":
        assert (place / "out" / "recording.srt").is_file()
        assert (place / "onnx" / "decoder.onnx").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for code in re.findall(r"^```python\n(.*?)^```", runnable(path), re.MULTILINE | re.DOTALL):
        exec(code, {})
        assert "odern" in capsys.readouterr().out
