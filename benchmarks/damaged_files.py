"""A thousand damaged files through one call of `dawhisper transcribe`: who is transcribed, who is named, what memory.

    python benchmarks/damaged_files.py [COUNT]

The clips in assets, in all formats that PyAV writes here, have bytes flipped, cut off, zeroed or joined with another's;
one in ten stays whole. A tiny random model transcribes them. Prints the counts and the growth of the memory.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.models import MULTILINGUAL, pair
from helpers.recordings import Recipe, write

from dawhisper import load_audio
from dawhisper.cli import main

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FORMATS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "opus": "libopus",
    "oga": "flac",
    "m4a": "aac",
    "mp4": "aac",
    "mov": "alac",
    "mkv": "aac",
    "webm": "libopus",
    "ts": "aac",
    "avi": "libmp3lame",
    "aac": "aac",
    "ac3": "ac3",
    "aiff": "pcm_s16be",
    "au": "pcm_s16be",
    "caf": "pcm_s16le",
    "w64": "pcm_s16le",
    "wv": "wavpack",
    "tta": "tta",
    "mp2": "mp2",
    "flv": "aac",
}


def damaged(content: bytes, other: bytes, kind: str, chance: random.Random) -> bytes:
    data = bytearray(content)
    if kind == "flipped":
        for _ in range(chance.choice([1, 10, 100, 1000])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "zeroed":
        first = chance.randrange(len(data))
        last = min(len(data), first + chance.randrange(1, len(data)))
        data[first:last] = bytes(last - first)
    elif kind == "joined":
        return content[: chance.randrange(len(content))] + other[chance.randrange(len(other)) :]
    return bytes(data)


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(count: int) -> None:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {}
        for suffix, codec in FORMATS.items():
            rate = 44100 if suffix == "flv" else 48000
            for i, clip in enumerate(("speech.opus", "speech_noisy.opus")):
                path = folder / f"source{i}.{suffix}"
                write(path, Recipe(codec, rate), load_audio(ASSETS / clip, sr=rate)[None])
                sources[suffix, i] = path.read_bytes()
                path.unlink()
        whole, broken = [], []
        for n in range(count):
            (suffix, _), content = chance.choice(list(sources.items()))
            kind = "whole" if n % 10 == 0 else chance.choice(["flipped", "cut", "zeroed", "joined"])
            path = folder / f"{kind}{n}.{suffix}"
            path.write_bytes(damaged(content, chance.choice(list(sources.values())), kind, chance))
            (whole if kind == "whole" else broken).append(path)
        model, _ = pair(MULTILINGUAL, eot_bias=60.0)  # it ends at once
        weights = folder / "random.pt"
        torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, weights)
        options = [
            "--model",
            str(weights),
            "--device",
            "cpu",
            "--threads",
            "1",
            "--language",
            "en",
            "--beam_size",
            "None",
            "-f",
            "txt",
        ]
        options += ["--temperature_increment_on_fallback", "None", "--no_speech_threshold", "None"]
        out = folder / "out"
        files = sorted([*whole, *broken], key=lambda path: chance.random())
        first, rest = files[: count // 10], files[count // 10 :]
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main(["transcribe", *map(str, first), *options, "-o", str(out / "first")])
            before = peak()
            code = main(["transcribe", *map(str, rest), *options, "-o", str(out)])
        after = peak()
        lines = said.getvalue().splitlines()
        errors = [line for line in lines if line.startswith("dawhisper: error:")]
        warned = [line for line in lines if line.startswith("dawhisper: warning:")]
        done = {path.stem for path in [*out.glob("*.txt"), *(out / "first").glob("*.txt")]}
        named = [path for path in files if any(path.name in line for line in errors)]
        print(f"{count} files, exit code {code}")
        print(f"whole: {len(whole)}, of which transcribed: {sum(path.stem in done for path in whole)}")
        print(f"damaged: {len(broken)}, of which transcribed: {sum(path.stem in done for path in broken)}")
        print(
            f"named as unreadable: {len(named)}; neither: {sum(p.stem not in done and p not in named for p in files)}"
        )
        print(f"warned of: {len({p for p in files if any(p.name in line for line in warned)})}")
        print(f"unforeseen: {sum('unexpected' in line for line in errors)}")
        print(f"tracebacks: {sum('Traceback' in line for line in lines)}")
        print(f"peak memory after the first {len(first)}: {before:.0f} MB, after all: {after:.0f} MB")
        for line in errors:
            if "unexpected" in line:
                print(line)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
