"""dawhisper beside openai-whisper on the CPU or a GPU, in one process run: same text, word errors, time, memory.

    python benchmarks/against_openai.py base.pt MANIFEST... --limit 40 --out benchmarks/NAME.md
    python benchmarks/against_openai.py base.pt --long chapter.opus --words

Each recording goes through both in turn, which of them first alternating; both get the same samples, one torch and its
threads. Peak memory is that of a process of its own for each, which loads the model and transcribes one recording.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
import whisper
from whisper.normalizers import EnglishTextNormalizer

import dawhisper

WHO = ("dawhisper", "openai-whisper")
Result = dict[str, Any]


@dataclass
class Tally:
    """What is summed over the recordings."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WHO, 0.0))
    texts: dict[str, list[str]] = field(default_factory=lambda: {who: [] for who in WHO})
    references: list[str] = field(default_factory=list)
    audio: float = 0.0
    same: int = 0
    segments: int = 0
    words: int = 0
    worst: float = 0.0  # largest difference of a segment's or word's time, in seconds


def transcriber(who: str, model: str, device: str) -> Callable[..., Result]:
    """Samples and options -> openai-whisper's dict."""
    if who == "dawhisper":
        ours = dawhisper.load_model(model, device=device)
        return lambda audio, **options: dawhisper.transcribe(ours, audio, **options).to_dict()
    theirs = whisper.load_model(model, device=device)
    return lambda audio, **options: whisper.transcribe(theirs, audio, fp16=device != "cpu", **options)


def same_text(a: Result, b: Result) -> bool:
    keys = ("seek", "text", "tokens")
    pairs = zip(a["segments"], b["segments"])
    return len(a["segments"]) == len(b["segments"]) and all(x[k] == y[k] for x, y in pairs for k in keys)


def time_differences(a: Result, b: Result) -> list[float]:
    found = [0.0]
    for x, y in zip(a["segments"], b["segments"]):
        for p, q in [(x, y), *zip(x.get("words", ()), y.get("words", ()))]:
            found += [abs(p["start"] - q["start"]), abs(p["end"] - q["end"])]
    return found


def compare(run: dict[str, Callable[..., Result]], clips: list[tuple[np.ndarray, str]], options: Result) -> Tally:
    tally = Tally()
    for turn, (audio, reference) in enumerate(clips):
        results = {}
        for who in WHO if turn % 2 == 0 else WHO[::-1]:
            torch.manual_seed(0)  # the fallback samples
            started = time.perf_counter()
            results[who] = run[who](audio, **options)
            tally.seconds[who] += time.perf_counter() - started
            tally.texts[who].append(results[who]["text"])
        ours, theirs = (results[who] for who in WHO)
        tally.same += same_text(ours, theirs)
        tally.worst = max(tally.worst, *time_differences(ours, theirs))
        tally.segments += len(ours["segments"])
        tally.words += sum(len(s.get("words", ())) for s in ours["segments"])
        tally.references.append(reference)
        tally.audio += len(audio) / 16000
    return tally


def word_error_rate(tally: Tally, who: str) -> float:
    normal = EnglishTextNormalizer()
    pairs = [(normal(r), normal(t)) for r, t in zip(tally.references, tally.texts[who]) if normal(r)]
    return 100 * jiwer.wer([r for r, _ in pairs], [t for _, t in pairs]) if pairs else float("nan")


def peak_memory(who: str, model: str, device: str, audio: np.ndarray, options: Result, threads: int) -> float:
    """GiB of a process that does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_transcribe_once, (who, model, device, audio, options, threads))


def _transcribe_once(who: str, model: str, device: str, audio: np.ndarray, options: Result, threads: int) -> float:
    torch.set_num_threads(threads)
    transcriber(who, model, device)(audio, **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def load_clips(args: argparse.Namespace) -> list[tuple[np.ndarray, str]]:
    clips = [(dawhisper.load_audio(path), "") for path in args.long]
    for given in args.manifest:
        path = given / "manifest.jsonl" if given.is_dir() else given
        lines = [json.loads(line) for line in path.read_text().splitlines()][: args.limit or None]
        clips += [(dawhisper.load_audio(path.parent / line["audio"]), line["text"]) for line in lines]
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an OpenAI checkpoint: name or path")
    parser.add_argument("manifest", nargs="*", type=Path, help="JSONL manifests with audio and text")
    parser.add_argument("--long", nargs="*", default=[], help="long recordings, compared without a reference")
    parser.add_argument("--limit", type=int, default=0, help="clips of each manifest; 0 is all")
    parser.add_argument("--beam", nargs="+", type=int, default=[1, 5], help="beam sizes; 1 is greedy")
    parser.add_argument("--words", action="store_true", help="with word times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    clips = load_clips(args)
    run = {who: transcriber(who, args.model, args.device) for who in WHO}
    lines = [
        f"{len(clips)} recordings, {sum(len(a) for a, _ in clips) / 960000:.1f} minutes; {args.threads} threads, "
        f"{args.device}, torch {torch.__version__}, Python {platform.python_version()}\n",
        "| decoding | same text | largest time difference | WER ours / theirs | x real time ours / theirs "
        "| theirs / ours | GiB ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for beam in args.beam:
        options: Result = {"language": "en", "word_timestamps": args.words}
        options |= {} if beam == 1 else {"beam_size": beam}
        for who in WHO:
            run[who](clips[0][0][: 5 * 16000], **options)  # warm-up
        tally = compare(run, clips, options)
        wer = [word_error_rate(tally, who) for who in WHO]
        speed = [tally.audio / tally.seconds[who] for who in WHO]
        memory = [peak_memory(who, args.model, args.device, clips[0][0], options, args.threads) for who in WHO]
        lines.append(
            f"| {'greedy' if beam == 1 else f'beam {beam}'}{', word times' if args.words else ''} "
            f"| {tally.same} of {len(clips)} ({tally.segments} segments, {tally.words} words) | {tally.worst:.3f} s "
            f"| {wer[0]:.2f} / {wer[1]:.2f} | {speed[0]:.1f} / {speed[1]:.1f} "
            f"| {speed[0] / speed[1]:.2f} | {memory[0]:.2f} / {memory[1]:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        with args.out.open("a") as f:
            f.write(f"\n```\npython benchmarks/against_openai.py {' '.join(sys.argv[1:])}\n```\n\n{table}")


if __name__ == "__main__":
    main()
