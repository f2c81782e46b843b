"""Streaming beside offline transcription: word errors, latency of words, compute per second of audio.

    python benchmarks/streaming_latency.py tiny.en.pt base.pt --audio chapter.opus --text manifest.jsonl
    python benchmarks/streaming_latency.py base.pt --audio chapter.opus --text manifest.jsonl --noise DIR --snr 5
    python benchmarks/streaming_latency.py base.pt --sessions test/manifest.jsonl --count 100 --noise DIR

The clock is simulated: audio arrives in real time, an update takes what its computation was measured to take, and
starts when the one before is done and a step of new audio has come. A word's latency is the clock when it is printed,
minus its end in the clean audio (word times of the first model's offline transcription); it counts the words that are
the same in both, matched by the alignment of the word error rate. Word errors are against the reference text.

With --sessions each of `count` clips is a session of its own, clean and with noise at 10, 5 and 0 dB in turn. Counted
are what a user sees, final and pending words alike: seconds from the first speech to the first text, and sessions
whose text loops at any time (a phrase four times in a row, or more characters than 30 for each second heard).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from whisper.normalizers import EnglishTextNormalizer

import dawhisper
from dawhisper import vad
from dawhisper.audio import SAMPLE_RATE
from dawhisper.noise.mixing import add_noise
from dawhisper.serve.stream import REPEATED, Stream, StreamOptions, Update, text_of, warm_up

normalize = EnglishTextNormalizer()
SNRS = (None, 10.0, 5.0, 0.0)


@dataclass(frozen=True)
class Printed:
    """A normalised word and a time: of its end in the audio, or of when it was printed."""

    word: str
    time: float


@dataclass(frozen=True)
class Shown:
    """What is to be seen after an update: when, after how much audio (seconds), and the words, final and pending."""

    time: float
    heard: float
    text: str

    @property
    def loops(self) -> bool:
        return bool(REPEATED.search(self.text)) or len(self.text) > 30 * (self.heard + 1)


@dataclass(frozen=True)
class Run:
    text: str
    printed: list[Printed]
    compute: float  # seconds
    slowest: float  # update
    shown: list[Shown]


def simulate(
    model: dawhisper.Whisper,
    audio: np.ndarray,
    options: StreamOptions,
    instant: bool,
    clock_of_work: Callable[[], float] = time.perf_counter,
) -> Run:
    stream, clock, compute, slowest, fed = Stream(model, options), 0.0, 0.0, 0.0, 0
    text, printed, shown = "", [], []
    while fed < len(audio):
        clock = max(clock, (fed + stream.wanted) / SAMPLE_RATE)
        arrived = min(len(audio), int(clock * SAMPLE_RATE))
        final = arrived == len(audio)
        began = clock_of_work()
        update: Update = stream.feed(audio[fed:arrived])
        if final:
            update += stream.finish()
        took = clock_of_work() - began
        fed, compute, slowest = arrived, compute + took, max(slowest, took)
        clock += 0.0 if instant else took
        text += text_of(update.words)
        printed += [Printed(w, clock) for word in update.words for w in normalize(word.word).split()]
        shown.append(Shown(clock, arrived / SAMPLE_RATE, text + update.pending))
    return Run(text, printed, compute, slowest, shown)


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


@dataclass(frozen=True)
class Session:
    clip: str
    snr: float | None
    wait: float  # seconds from the first speech to the first text; nan where none came
    right: float  # to the first final word that is in the reference
    loop: str
    errors: int
    words: int
    run: Run


def session(model: dawhisper.Whisper, row: dict[str, Any], audio: np.ndarray, snr: float | None, args: Any) -> Session:
    heard = audio if snr is None or args.noise is None else mixed(audio, args.noise, snr)
    speech = vad.detector()(audio) >= vad.THRESHOLD
    onset = int(speech.argmax()) * vad.VAD_FRAME / SAMPLE_RATE
    options = StreamOptions(language="en", step=args.step[0])
    run = simulate(model, heard, options, args.instant, time.process_time if args.cpu_time else time.perf_counter)
    first = next((s.time for s in run.shown if s.text.strip()), float("nan"))
    reference = normalize(row["text"]).split()
    right = next((p.time for p in run.printed if p.word in reference), float("nan"))
    loop = next((s.text for s in run.shown if s.loops), "")
    both = jiwer.process_words(" ".join(reference), normalize(run.text))
    errors = both.substitutions + both.deletions + both.insertions
    return Session(Path(row["audio"]).stem, snr, first - onset, right - onset, loop, errors, len(reference), run)


def sessions(args: Any) -> None:
    """Each clip as a session, and what its user sees."""
    rows = [
        {**row, "audio": str(manifest.parent / row["audio"])}
        for manifest in args.sessions
        for row in map(json.loads, manifest.read_text().splitlines())
        if row["duration"] <= args.longest_clip
    ]
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(args.count, len(rows))).round().astype(int)]
    for name in args.models:
        model = dawhisper.load_model(name, device="cpu")
        warm_up(model)
        made = []
        for i, row in enumerate(rows):
            done = session(model, row, dawhisper.load_audio(row["audio"]), SNRS[i % len(SNRS)], args)
            made.append(done)
            if args.show or done.loop:
                print(f"{done.clip} {done.snr} dB, {done.wait:.2f} s: {done.run.text}; loop: {done.loop!r}", flush=True)
        for snr in [*SNRS, "all"]:
            if some := [s for s in made if snr in ("all", s.snr)]:
                print(f"{Path(name).stem} {'clean' if snr is None else snr}: {summary(some)}", flush=True)


def summary(made: list[Session]) -> str:
    texts = [s for s in made if s.run.shown[-1].text.strip()]
    seconds = sum(s.run.shown[-1].heard for s in made)
    return (
        f"{len(made)} sessions of {seconds:.0f} s, {sum(bool(s.loop) for s in made)} loop, {len(texts)} with text; "
        f"first text {quantiles([s.wait for s in texts])}; "
        f"first right final word {quantiles([s.right for s in texts])}; "
        f"WER {100 * sum(s.errors for s in made) / sum(s.words for s in made):.1f}%; "
        f"{sum(s.run.compute for s in made) / seconds:.2f} s a second"
    )


def quantiles(values: Sequence[float]) -> str:
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return "never"
    middle, late, last = np.quantile(known, [0.5, 0.95, 1.0])
    return f"{middle:.2f} s median, {late:.2f} s 95th percentile, {last:.2f} s at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--audio")
    parser.add_argument("--text", help="manifest whose first line has the text")
    parser.add_argument("--sessions", nargs="+", type=Path, metavar="MANIFEST", help="each clip is a session")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--longest_clip", type=float, default=8.0, help="seconds of a session's clip")
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
    parser.add_argument("--cpu_time", action="store_true", help="time of one thread's work, on a machine with others")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    torch.set_num_threads(args.threads)
    if args.sessions:
        sessions(args)
        return
    if not (args.audio and args.text):
        parser.error("--audio and --text, or --sessions")
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
