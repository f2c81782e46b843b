"""Streaming beside offline transcription: word errors, latency of words, compute per second of audio.

    python benchmarks/streaming_latency.py tiny.en.pt base.pt --audio chapter.opus --text manifest.jsonl
    python benchmarks/streaming_latency.py base.pt --audio chapter.opus --text manifest.jsonl --noise DIR --snr 5

The clock is simulated: audio arrives in real time, an update takes what its computation was measured to take, and
starts when the one before is done and a step of new audio has come. A word's latency is the clock when it is printed,
minus its end in the clean audio (word times of the first model's offline transcription); it counts the words that are
the same in both, matched by the alignment of the word error rate. Word errors are against the reference text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jiwer
import numpy as np
import torch
from whisper.normalizers import EnglishTextNormalizer

import dawhisper
from dawhisper.audio import SAMPLE_RATE
from dawhisper.noise.mixing import add_noise
from dawhisper.serve.stream import Stream, StreamOptions, Update, text_of

normalize = EnglishTextNormalizer()


@dataclass(frozen=True)
class Printed:
    """A normalised word and a time: of its end in the audio, or of when it was printed."""

    word: str
    time: float


@dataclass(frozen=True)
class Run:
    text: str
    printed: list[Printed]
    compute: float  # seconds
    slowest: float  # update


def simulate(model: dawhisper.Whisper, audio: np.ndarray, options: StreamOptions, instant: bool) -> Run:
    stream, clock, compute, slowest, fed = Stream(model, options), 0.0, 0.0, 0.0, 0
    text, printed = "", []
    while fed < len(audio):
        clock = max(clock, fed / SAMPLE_RATE + options.step)
        arrived = min(len(audio), int(clock * SAMPLE_RATE))
        final = arrived == len(audio)
        began = time.perf_counter()
        update: Update = stream.feed(audio[fed:arrived])
        if final:
            update += stream.finish()
        took = time.perf_counter() - began
        fed, compute, slowest = arrived, compute + took, max(slowest, took)
        clock += 0.0 if instant else took
        text += text_of(update.words)
        printed += [Printed(w, clock) for word in update.words for w in normalize(word.word).split()]
    return Run(text, printed, compute, slowest)


def latencies(spoken: Sequence[Printed], printed: Sequence[Printed]) -> np.ndarray:
    """Seconds from a word's end to its print, of the words that both have."""
    both = jiwer.process_words(" ".join(p.word for p in spoken), " ".join(p.word for p in printed))
    pairs = [
        (chunk.ref_start_idx + i, chunk.hyp_start_idx + i)
        for chunk in both.alignments[0]
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]
    return np.array([printed[j].time - spoken[i].time for i, j in pairs])


def mixed(audio: np.ndarray, folder: Path, snr: float) -> np.ndarray:
    """The recordings of a folder, in order of their names, one after the other under the speech."""
    noise = np.concatenate([dawhisper.load_audio(p) for p in sorted(folder.glob("*.opus"))])
    noise = np.resize(noise, len(audio))
    both = (torch.from_numpy(x)[None] for x in (audio, noise))
    return add_noise(*both, torch.tensor([snr]), torch.tensor([len(audio)]))[0][0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--audio", required=True)
    parser.add_argument("--text", required=True, help="manifest whose first line has the text")
    parser.add_argument("--noise", type=Path, help="folder of recordings to mix in")
    parser.add_argument("--snr", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, help="only the beginning; word errors are then against offline text")
    parser.add_argument("--policy", nargs="+", default=["attention", "agreement"])
    parser.add_argument("--margin", nargs="+", type=float, default=[0.5])
    parser.add_argument("--step", nargs="+", type=float, default=[1.0])
    parser.add_argument("--longest", nargs="+", type=float, default=[15.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instant", action="store_true", help="computation takes no time on the clock")
    parser.add_argument("--show", action="store_true", help="print the texts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clean = dawhisper.load_audio(args.audio, end=args.seconds)
    heard = clean if args.noise is None else mixed(clean, args.noise, args.snr)
    seconds = len(clean) / SAMPLE_RATE
    reference = json.loads(Path(args.text).read_text().splitlines()[0])["text"]
    spoken: list[Printed] = []
    for name in args.models:
        model = dawhisper.load_model(name, device="cpu")
        offline = model.transcribe(clean, language="en", word_timestamps=True, temperature=0.0)
        if not spoken:
            words = [w for s in offline.segments for w in s.words or []]
            spoken = [Printed(n, w.end) for w in words for n in normalize(w.word).split()]
            if args.seconds:
                reference = offline.text
        began = time.perf_counter()
        offline = model.transcribe(heard, language="en", temperature=0.0)
        print(
            f"{Path(name).stem} offline: WER {wer(reference, offline.text):.1f}%, "
            f"{(time.perf_counter() - began) / seconds:.2f} s a second",
            flush=True,
        )
        plain = StreamOptions(language="en")
        runs = [
            replace(plain, policy=p, step=s, longest=n) for p in args.policy for s in args.step for n in args.longest
        ]
        for options in runs:
            for margin in args.margin if options.policy == "attention" else args.margin[:1]:
                run = simulate(model, heard, replace(options, margin=margin), args.instant)
                late = latencies(spoken, run.printed)
                print(
                    f"{Path(name).stem} {options.policy} margin {margin:g} step {options.step:g} longest "
                    f"{options.longest:g}: WER {wer(reference, run.text):.1f}%, latency {late.mean():.2f} s mean, "
                    f"{np.percentile(late, 95):.2f} s 95th percentile, {run.compute / seconds:.2f} s a second, "
                    f"slowest update {run.slowest:.2f} s",
                    flush=True,
                )
                if args.show:
                    print(run.text, flush=True)


def wer(reference: str, text: str) -> float:
    return 100 * jiwer.wer(normalize(reference), normalize(text))


if __name__ == "__main__":
    main()
