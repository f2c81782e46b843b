"""Speed on the CPU, one clip at a time, of several models in one run: times real time and word errors.

    python benchmarks/cpu_speed.py MANIFEST --limit 40 base.pt:int8 base.pt:fp32 faster:FOLDER:int8 openai:base.pt:fp32

Each model is MODEL:DTYPE, with the names of `dawhisper evaluate` (cpp:FILE:fp16 is whisper.cpp, whose FILE is what its
models/convert-pt-to-ggml.py makes of a .pt; it computes in that file's type whatever is said here), and has a process
of its own, as it would in use: two packages' thread pools in one process halve the speed of the one with the finer
work. Every clip goes through all of them in turn, the first one changing from clip to clip, so that whatever else the
machine does falls on all alike. The time is that from samples to text. The last column compares each with the first
model, clip by clip.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import torch

from dawhisper.audio import SAMPLE_RATE
from dawhisper.evaluation.metrics import count_words, error_rate, normalizer
from dawhisper.evaluation.recognizers import Decoding, load_recognizer, parse_models
from dawhisper.tools.bench import load_clips

model: Any = None  # of a model's own process


def start(given: str, beam: int | None, threads: int) -> None:
    global model
    torch.set_num_threads(threads)
    name, _, dtype = given.rpartition(":")
    model = load_recognizer(parse_models([name])[0], Decoding(beam, dtype=dtype), torch.device("cpu"), seed=0)


def hear(audio: np.ndarray) -> tuple[float, str]:
    """Seconds, and the text."""
    started = time.perf_counter()
    [text] = model([audio], "en")
    return time.perf_counter() - started, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="JSONL manifest with audio and text, a folder with one, or a shard")
    parser.add_argument("models", nargs="+", metavar="MODEL:DTYPE")
    parser.add_argument("--limit", type=int, default=0, help="clips of the manifest; 0 is all")
    parser.add_argument("--beam", type=int, help="beam size; greedy by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # CTranslate2's
    clips = load_clips([args.manifest], args.limit)
    spawn = multiprocessing.get_context("spawn")
    run = {m: ProcessPoolExecutor(1, spawn, start, (m, args.beam, args.threads)) for m in args.models}
    for pool in run.values():
        pool.submit(hear, clips[0].audio).result()  # warm-up

    seconds: dict[str, list[float]] = {name: [] for name in run}
    texts: dict[str, list[str]] = {name: [] for name in run}
    for turn, clip in enumerate(clips):
        order = list(run)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            took, text = run[name].submit(hear, clip.audio).result()
            texts[name].append(text)
            seconds[name].append(took)

    normal = normalizer("auto", "en")
    total = sum(len(clip.audio) for clip in clips) / SAMPLE_RATE
    kind = f"beam {args.beam}" if args.beam else "greedy"
    print(f"{len(clips)} clips, {total / len(clips):.1f} s each, {args.threads} threads, {kind}\n")
    print("| model | x real time | s a clip | WER | speed beside the first (median of clips) |\n|---|---|---|---|---|")
    for name in run:
        pairs = [(normal(clip.text), normal(text)) for clip, text in zip(clips, texts[name])]
        wer = 100 * error_rate([count_words(*pair) for pair in pairs if pair[0]])
        beside = median(first / own for first, own in zip(seconds[args.models[0]], seconds[name]))
        whole = sum(seconds[name])
        print(f"| {name} | {total / whole:.1f} | {whole / len(clips):.3f} | {wer:.2f} | {beside:.2f} |", flush=True)


if __name__ == "__main__":
    main()
