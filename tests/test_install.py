"""What a user sees when a package is missing or doesn't load, and that the project's metadata tell the truth."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.models import MULTILINGUAL, save_openai, talkative
from helpers.sound import write_clips

from dawhisper import cli
from dawhisper.model import Whisper

if sys.version_info < (3, 11):
    import tomli as tomllib  # pytest needs it there
else:
    import tomllib

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "assets" / "speech.opus"
COMPOSED = ("compose.yaml", "compose.cuda.yaml")

# where the code is that an extra is for
CODE = {
    "": ["dawhisper"],
    "evaluate": ["dawhisper/evaluation"],
    "train": ["train.py", "dawhisper/training", "dawhisper/noise"],
    "serve": ["dawhisper/serve"],
    "stream": ["dawhisper/serve/sources.py"],
    "export": ["dawhisper/tools/export.py", "dawhisper/formats/onnx.py"],
    "plot": ["dawhisper/evaluation/figures.py", "dawhisper/tools/view_figures.py"],
    "bench": ["dawhisper/evaluation/recognizers.py", "dawhisper/tools/bench.py", "dawhisper/formats/huggingface.py"],
    "vad": ["dawhisper/vad.py"],
    "corpora": ["dawhisper/data/corpora.py"],
    "ray": ["dawhisper/bulk", "tests/bulk"],
    "front_end": ["dawhisper/deepfilternet.py"],
    "diarize": ["dawhisper/speakers.py"],
    "test": ["tests"],
}
MODULES = {"openai-whisper": "whisper", "pyyaml": "yaml", "import-linter": "importlinter"}
USED_BY_OTHERS = {
    "onnxscript": "torch.onnx",
    "tensorboard": "torch.utils.tensorboard",
    "python-multipart": "fastapi reads uploads with it",
    "websockets": "uvicorn speaks with it",
    "onnxruntime": "silero-vad runs in it",
    "scipy": "lhotse resamples with it where there is no torchaudio",
    "pytest-timeout": "pyproject.toml's options for pytest",
    "pytest-xdist": "pyproject.toml's options for pytest",
}
# imported too, since they are a part of what is named
BROUGHT_ALONG = {
    "starlette": "fastapi",
    "ctranslate2": "faster-whisper",
    "triton": "torch",
    "tiktoken": "openai-whisper",
}

# a peer that every extra would have to compile where it has no wheel: who compares with it installs it
BY_HAND = {"pywhispercpp"}

WITHOUT_TORCHAUDIO = """
import sys
from pathlib import Path
import httpx
from helpers.command_line import QUICK
from helpers.server import running
from dawhisper import cli, load_model
from dawhisper.formats.huggingface import to_transformers
import train

model, clip, clips, out = sys.argv[1:]
manifest, few = str(Path(clips) / "manifest.jsonl"), ["--model", model, "--device", "cpu"]
short = ["--limit", "1", "--bootstrap-samples", "10", "--model", f"hf:{out}/transformers"]
Path(out, "transformers").mkdir(parents=True)
to_transformers(load_model(model, device="cpu", dtype="fp32"), Path(out, "transformers"))
for words in (
    ["transcribe", clip, "--model", model, *QUICK, "--vad_filter", "True", "-o", out + "/text"],
    ["bench", clip, *few, "--against", "transformers", "--threads", "1", "--converted", out + "/converted"],
    ["export", "--model", model, "--out", out + "/onnx"],
    ["prepare", manifest, "--out", out + "/prepared", "--language", "en", "--split", "1", "0", "0"],
    ["join", manifest, "--out", out + "/joined", "--seconds", "1", "29"],
    ["evaluate", manifest, *few, *short, "--kinds", "reverb", "--snr", "0", "--out", out + "/errors"],
    ["visualize", clip, "--noise", clip, *few, "--language", "en", "--text", "modern", "-o", out + "/pictures"],
):
    code = cli.main(words)
    print(words[0], code, flush=True)
with running({"tiny": load_model(model, device="cpu")}) as server:
    print("serve", 0 if httpx.get(server.url + "/health").status_code == 200 else 1)
print("train", train.main(["configs/base_noise.yaml", f"model.name={model}", f"data.train={manifest}", "device=cpu",
    "data.workers=0", f"data.noise={clips}", f"out={out}/run", "model.branch.memory_layers=1"]))
"""


WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from helpers.command_line import QUICK

missing, model, clip, clips, out = sys.argv[1:]
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in missing.split() else find_spec(name, *rest)
from dawhisper import bulk, cli
from dawhisper.errors import OptionError

few = ["--model", model, "--device", "cpu"]
look = ["visualize", clip, *few, "--text", "one", "--language", "en", "-o", out]
Path(out).mkdir()
Path(out, "cuts.jsonl").write_text('{"supervisions": []}')
for words in ( # what needs no extra
    ["transcribe", clip, "--model", model, *QUICK, "--vad_filter", "True", "-o", out],
    ["prepare", clips, "--out", out + "/prepared", "--language", "en"],
    ["join", clips, "--out", out + "/joined", "--seconds", "1", "29"],
    ["quantize", "--model", model, "--out", out + "/whole.safetensors"],
    ["average", out + "/whole.safetensors", out + "/whole.safetensors", "--out", out + "/mean.safetensors"],
    ["export", "--model", model, "--out", out + "/graphs", "--format", "torch"],
    look,
):
    assert cli.main(words) == 0, words
for extra, *words in (
    ["serve", "serve", "--model", model],
    ["serve", "serve", "--help"],
    ["stream", "stream", *few],
    ["evaluate", "evaluate", clips, "--model", model],
    ["bench", "bench", clip, "--model", model],
    ["export", "export", "--model", model, "--out", out],
    ["plot", *look, "-f", "png"],
    ["evaluate", "quantize", "--model", model, "--out", out + "/tiny.safetensors", "--manifest", clips],
    ["corpora", "prepare", out + "/cuts.jsonl", "--out", out + "/cuts"],
    ["front_end", "transcribe", clip, "--model", model, *QUICK, "--front_end", "deepfilternet", "-o", out],
    ["diarize", "transcribe", clip, "--model", model, *QUICK, "--diarize", "True", "-o", out],
):
    print("wanted", extra, file=sys.stderr)
    assert cli.main(words) == 1, words
assert not Path(out, "tiny.safetensors").exists() # said before the work
print("wanted ray", file=sys.stderr)
try:
    bulk.missing([], out)
except OptionError as error:
    cli.fail(str(error))
print("wanted train", file=sys.stderr)
import train
"""


def program(code: str, *words: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    folders = [*([str(path)] if path else []), str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", code, *(str(word) for word in words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = talkative(Whisper(MULTILINGUAL).eval(), eot_bias=1000.0)
    return save_openai(model, tmp_path_factory.mktemp("tiny") / "tiny.pt")


def test_a_torchaudio_that_does_not_load_stops_only_training(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torchaudio.py").write_text("raise OSError('libtorchaudio.so: undefined symbol')")
    manifest = write_clips(tmp_path / "clips", 6, seed=1)
    manifest.write_text(re.sub(r'"speaker": "\d"', '"speaker": "a"', manifest.read_text()))  # for join
    clips = manifest.parent
    done = program(WITHOUT_TORCHAUDIO, tiny, CLIP, clips, tmp_path / "out", path=broken)
    codes = dict(re.findall(r"^([a-z]+) (\d)$", done.stdout, re.MULTILINE))
    wanted = ("transcribe", "bench", "export", "prepare", "join", "evaluate", "visualize", "serve")
    assert codes == {**dict.fromkeys(wanted, "0"), "train": "1"}, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("train: error: ")]
    assert "undefined symbol" in said and "pip install torch==" in said
    assert "Traceback" not in done.stderr


def test_torchaudio_is_imported_to_train_and_to_know_whether_it_loads() -> None:
    """So the commands that the program above leaves out, such as align, do without it too."""
    importing = {
        file.relative_to(ROOT).as_posix() for file in ROOT.glob("dawhisper/**/*.py") if "torchaudio" in imports(file)
    }
    assert importing == {"dawhisper/noise/augment.py", "dawhisper/formats/huggingface.py"}


def test_a_command_without_its_extra_says_what_to_install(tiny: Path, tmp_path: Path) -> None:
    modules = {MODULES.get(name, name.replace("-", "_")) for name, extra in entries() if extra}
    modules -= {MODULES.get(name, name) for name, extra in entries() if not extra}
    manifest = write_clips(tmp_path / "clips", 6, seed=1)
    manifest.write_text(re.sub(r'"speaker": "\d"', '"speaker": "a"', manifest.read_text()))  # for join
    done = program(WITHOUT_EXTRAS, " ".join(modules), tiny, CLIP, manifest.parent, tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = re.findall(
        r"^wanted (\w+)\n(?:dawhisper: warning: .*\n)*(?:dawhisper|train): error: .*pip install 'dawhisper\[(\w+)\]'",
        done.stderr,
        re.MULTILINE,
    )
    assert len(said) == done.stderr.count("wanted ") and all(extra == told for extra, told in said), done.stderr
    without = {"", "vad", "test"}  # the detector of loudness stands in for vad
    assert {extra for extra, _ in said} == {extra for _, extra in entries()} - without


@cache
def imports(file: Path) -> frozenset[str]:
    text = file.read_text("utf-8")
    names = set(re.findall(r"(?:importorskip|_package)\(\"(\w+)", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return frozenset(name.split(".")[0] for name in names)


def third_party_imports(*places: str) -> set[str]:
    """What Python files import, but for the standard library's and the project's own."""
    files = [file for place in places for file in [ROOT / place, *(ROOT / place).rglob("*.py")] if file.is_file()]
    own = {"dawhisper", "train", "helpers", "tests", "sampler"}
    return {name for file in files for name in imports(file)} - sys.stdlib_module_names - own


@cache
def entries() -> frozenset[tuple[str, str]]:
    """The packages that pyproject.toml names, each with its extra ("" for all users), but for the tools of `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {"": project["dependencies"], **project["optional-dependencies"]}
    named = {(re.split(r"[^\w-]", line)[0].lower(), extra) for extra, lines in wanted.items() for line in lines}
    return frozenset((name, extra) for name, extra in named if name != "dawhisper" and extra != "dev")


def test_an_extra_names_what_its_code_imports() -> None:
    for name, extra in entries():
        imported = MODULES.get(name, name.replace("-", "_")) in third_party_imports(*CODE[extra])
        assert imported or name in USED_BY_OTHERS, f"{extra or 'dependencies'}: nothing uses {name}"


def test_what_the_code_imports_is_named() -> None:
    named = {name for name, _ in entries()}
    assert set(BROUGHT_ALONG.values()) | set(USED_BY_OTHERS) <= named
    modules = {MODULES.get(name, name.replace("-", "_")) for name in named} | set(BROUGHT_ALONG) | BY_HAND
    assert third_party_imports("dawhisper", "train.py", "transcribe.py", "scripts", "benchmarks") <= modules


def test_the_oldest_versions_of_every_extra_are_tried() -> None:
    tried = set(re.findall(r"^  \[(\w+)\]=", (ROOT / ".ci" / "lowest").read_text("utf-8"), re.MULTILINE))
    assert tried == {extra or "base" for _, extra in entries()}


def test_the_container_is_made_of_what_there_is() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "docker"
    lines = (folder / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    assert len(copied) >= 4 and all((ROOT / name).exists() for names in copied for name in names)
    assert set(re.findall(r"--extra (\w+)", " ".join(lines))) <= {extra for _, extra in entries()}
    [words] = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    [started] = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT ")]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--help"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(started) <= set(project["scripts"])
    services = [yaml.safe_load((folder / name).read_text("utf-8"))["services"] for name in COMPOSED]
    assert services[0].keys() == services[1].keys()  # the second file adds to the first one's
    build = services[0]["server"]["build"]
    assert (folder / build["context"] / build["dockerfile"]).resolve() == folder / "Dockerfile"
    named = {name for service in services for name in service["server"]["build"].get("args", {})}
    assert named <= {line.split()[1].split("=")[0] for line in lines if line.startswith("ARG ")}
