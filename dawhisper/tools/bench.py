"""How fast a model is, stage by stage and beside other packages on the same recordings, in one process run.

Stages are measured as throughput.py does, and set against what the machine can do. Packages take turns at each job,
so that a busy moment hits all of them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dawhisper.audio import SAMPLE_RATE, from_int16, load_audio
from dawhisper.batched import BatchedRecording, iter_batched
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL
from dawhisper.data.manifest import decode_audio, read_manifest
from dawhisper.device import DEVICE_HELP, DTYPE_HELP, DTYPE_NAMES, THREADS_HELP
from dawhisper.errors import OptionError, near_names
from dawhisper.evaluation.metrics import count_words, error_rate, normalizer
from dawhisper.evaluation.recognizers import (
    Decoding,
    Faster,
    HuggingFace,
    ModelSpec,
    Ours,
    check_models,
    load_recognizer,
)
from dawhisper.formats.huggingface import to_ctranslate2, to_transformers
from dawhisper.model import Whisper
from dawhisper.options import option
from dawhisper.timing import Word
from dawhisper.transcribe import transcribe_lazily
from dawhisper.transcription import Segment, TranscribeOptions

from .throughput import Throughput, copy_bandwidth, encoder_type, matmul_flops, measure

OURS = "dawhisper"
PEERS = {"openai-whisper": "openai", "faster-whisper": "faster", "transformers": "hf"}  # name: back end of `evaluate`
TYPES = {"openai": ("fp32", "fp16"), "hf": ("fp32", "fp16", "bf16")}  # faster-whisper says itself what it can't do
STEPS = 64  # tokens decoded to time a step


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    recordings: manifests (their text gives word errors) or sound files, transcribed one after the other, or with a
        batch_size, in batches. long: the same, always in batches, of 16 unless batch_size says otherwise.
    against: peers, `NAME` or `NAME:TYPE` with the type that they compute in.
    limit: recordings taken of each manifest; 0 is all. repeat: rounds; the fastest counts.
    converted: folder for the model in the peers' formats, kept for the next run.
    """

    recordings: Sequence[str] = option(
        (), "manifests (JSON lines or their folder) or sound files", positional=True, metavar="RECORDING"
    )
    long: Sequence[str] = option(
        (), "the same, in batches of windows; 16 unless --batch_size is given", metavar="RECORDING"
    )
    model: str = option(OWN_MODEL, MODEL_HELP)
    against: Sequence[str] = option(
        (), "openai-whisper faster-whisper transformers; NAME:int8 for a type", metavar="PEER"
    )
    limit: int = option(0, "recordings of each manifest; 0 is all", metavar="N")
    repeat: int = option(1, "rounds of which the fastest counts", metavar="N")
    batch_size: int | None = option(None, "windows decoded together; one recording at a time by default")
    beam_size: int | None = option(None, "beams; greedy by default")
    word_timestamps: bool = option(False, "times for each word")
    language: str | None = option("en", "spoken language; None detects it")
    dtype: str = option("auto", f"of dawhisper; {DTYPE_HELP}", choices=DTYPE_NAMES)
    device: str | None = option(None, DEVICE_HELP)
    threads: int = option(0, THREADS_HELP)
    converted: str = option(
        "~/.cache/dawhisper/converted", "where the peers' formats of the model are kept", metavar="DIR"
    )
    markdown: str | None = option(None, "write the tables there", metavar="FILE")
    json: str | None = option(None, "write all of it there", metavar="FILE")


@dataclass(frozen=True)
class Contestant:
    """A package and the number type that it computes in."""

    name: str
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"


@dataclass
class Tally:
    """What a contestant needed and heard, over all recordings of a section."""

    label: str
    seconds: float = 0.0
    real_time_factor: float = float("nan")  # seconds of work in a second of audio
    first_segment: float = float("nan")  # seconds until it was known, median over the jobs
    wer: float = float("nan")  # fraction
    missing: int = 0  # words of the references that were not heard
    same_text: int = 0  # recordings with the text of the first contestant
    time_difference: float | None = None  # largest of a segment or word, where all texts are the same, in seconds
    peak_gib: float = float("nan")
    texts: list[str] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class BenchClip:
    audio: np.ndarray
    text: str


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure, print tables, and write them where asked for. Returns what the JSON file holds."""
    if options.threads:
        torch.set_num_threads(options.threads)
    contestants = parse_contestants(options)
    sections = [
        (title, load_clips(given, options.limit), replace(options, batch_size=batch_size))
        for title, given, batch_size in (
            ("recordings", options.recordings, options.batch_size),
            ("long", options.long, options.batch_size or 16),
        )
        if given
    ]
    loaded = [load_contestant(contestant, options) for contestant in contestants]
    report: dict[str, Any] = {
        "environment": environment(options),
        "stages": [asdict(measure(loaded[0].model, n, STEPS)) for n in sorted({1, options.batch_size or 1})],
        "copy_gb_per_second": copy_bandwidth(loaded[0].model.device) / 1e9,
        "matmul_tflops": matmul_flops(loaded[0].model.device, encoder_type(loaded[0].model)) / 1e12,
        "sections": {},
    }
    for title, clips, section in sections:
        runners = {c.label: runner(recognizer, section) for c, recognizer in zip(contestants, loaded)}
        tallies = compete(runners, clips, section)
        for contestant, tally in zip(contestants, tallies):
            tally.peak_gib = peak_memory(contestant, section, clips[0].audio)
        report["sections"][title] = {
            "recordings": len(clips),
            "minutes": sum(len(c.audio) for c in clips) / SAMPLE_RATE / 60,
            "batch_size": section.batch_size,
            "contestants": [asdict(t) for t in tallies],
        }
    text = markdown(report)
    print(text)
    if options.markdown:
        Path(options.markdown).write_text(text, encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


# ----------------------------------------------------------------------------------------------------- contestants


def parse_contestants(options: BenchOptions) -> list[Contestant]:
    """Ours, then the peers. OptionError for a package that is unknown or not installed."""
    default = "fp16" if device_of(options).type == "cuda" else "fp32"
    parsed = [Contestant(OURS, options.dtype)]
    for given in options.against:
        name, _, dtype = given.partition(":")
        if name not in PEERS:
            raise OptionError(f"--against {given}: known are {', '.join(PEERS)}{near_names(name, PEERS)}")
        backend = PEERS[name]
        check_models([ModelSpec(given, backend, options.model if backend == "openai" else ".")])
        parsed.append(Contestant(name, dtype or default))
        if backend in TYPES and parsed[-1].dtype not in TYPES[backend]:
            raise OptionError(f"--against {given}: {name} computes in {' or '.join(TYPES[backend])}, not {dtype}")
    if len({c.label for c in parsed}) < len(parsed):
        raise OptionError(f"a package is named twice in --against {' '.join(options.against)}")
    if any(PEERS.get(c.name) in ("faster", "hf") for c in parsed) and importlib.util.find_spec("transformers") is None:
        raise OptionError("--against needs transformers to convert the model: pip install transformers")
    return parsed


def device_of(options: BenchOptions) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_contestant(contestant: Contestant, options: BenchOptions) -> Any:
    """A recogniser of recognizers.py, of the model in the contestant's format."""
    backend = PEERS.get(contestant.name, "")
    spec = ModelSpec(contestant.label, backend, options.model)
    if backend in ("faster", "hf"):
        spec = replace(spec, path=str(converted(spec, options)))
    decoding = Decoding(options.beam_size, fallback=True, dtype=contestant.dtype)
    return load_recognizer(spec, decoding, device_of(options), seed=0)


def converted(spec: ModelSpec, options: BenchOptions) -> Path:
    """The model's folder in the format of the back end, made where there is none yet."""
    from dawhisper.checkpoint import load_model

    folder = Path(options.converted).expanduser() / ModelSpec("", "", spec.path).fingerprint()
    if not (folder / "transformers" / "tokenizer.json").is_file():
        to_transformers(load_model(spec.path, "cpu", "fp32"), folder / "transformers")
    if spec.backend == "hf":
        return folder / "transformers"
    if not (folder / "ctranslate2" / "tokenizer.json").is_file():
        to_ctranslate2(folder / "transformers", folder / "ctranslate2")
    return folder / "ctranslate2"


Part = tuple[int, Any]  # place of a recording in the job, and a segment of it: with start, end and text, and words
Runner = Callable[[Sequence[np.ndarray]], Iterator[Part]]


def runner(recognizer: Any, options: BenchOptions) -> Runner:
    """How a job, one recording or many, is transcribed: with each package's own `transcribe` and its fallback."""
    flags: dict[str, Any] = {"language": options.language, "word_timestamps": options.word_timestamps}
    if isinstance(recognizer, Ours):
        return lambda job: run_ours(recognizer.model, job, flags | {"beam_size": options.beam_size}, options.batch_size)
    if isinstance(recognizer, Faster):
        return lambda job: run_faster(
            recognizer, job, flags | {"beam_size": options.beam_size or 1}, options.batch_size
        )
    if isinstance(recognizer, HuggingFace):
        return lambda job: run_transformers(recognizer, job, options)
    return lambda job: run_openai(recognizer, job, flags | {"beam_size": options.beam_size})


def run_ours(
    model: Whisper, job: Sequence[np.ndarray], flags: dict[str, Any], batch_size: int | None
) -> Iterator[Part]:
    if batch_size is None:
        for place, audio in enumerate(job):
            yield from ((place, segment) for segment in transcribe_lazily(model, audio, **flags)[0])
        return
    recordings = [BatchedRecording(audio) for audio in job]
    places = {id(recording): place for place, recording in enumerate(recordings)}
    for recording, segments in iter_batched(model, recordings, TranscribeOptions.of(batch_size=batch_size, **flags)):
        yield from ((places[id(recording)], segment) for segment in segments)


def run_openai(recognizer: Any, job: Sequence[np.ndarray], flags: dict[str, Any]) -> Iterator[Part]:
    for place, audio in enumerate(job):
        for segment in recognizer.model.transcribe(audio, fp16=recognizer.fp16, **flags)["segments"]:
            words = [Word(**word) for word in segment.get("words", ())]
            yield place, Segment(**{**segment, "words": words})


def run_faster(
    recognizer: Faster, job: Sequence[np.ndarray], flags: dict[str, Any], batch_size: int | None
) -> Iterator[Part]:
    from faster_whisper import BatchedInferencePipeline

    transcribe: Any = recognizer.model.transcribe
    if batch_size is not None:
        transcribe = BatchedInferencePipeline(recognizer.model).transcribe
        flags = flags | {"batch_size": batch_size}
    for place, audio in enumerate(job):
        yield from ((place, segment) for segment in transcribe(audio, **flags)[0])


def run_transformers(recognizer: HuggingFace, job: Sequence[np.ndarray], options: BenchOptions) -> Iterator[Part]:
    """Its fallback works for long recordings only, and its times are not compared."""
    size = options.batch_size or 1
    for first in range(0, len(job), size):
        texts = recognizer(job[first : first + size], options.language)
        yield from ((first + i, _Text(text)) for i, text in enumerate(texts))


@dataclass(frozen=True)
class _Text:
    text: str
    start: float = float("nan")
    end: float = float("nan")
    words: None = None


# ----------------------------------------------------------------------------------------------------- competition


def load_clips(given: Sequence[str], limit: int) -> list[BenchClip]:
    """The recordings of manifests, and sound files."""
    clips = []
    for name in given:
        path = Path(name)
        if path.is_dir() or path.suffix in (".jsonl", ".tar"):
            utterances = read_manifest(path)[: limit or None]
            clips += [BenchClip(from_int16(decode_audio(u)), u.text or "") for u in utterances]
        else:
            clips.append(BenchClip(load_audio(name), ""))
    return clips


def compete(runners: dict[str, Runner], clips: list[BenchClip], options: BenchOptions) -> list[Tally]:
    """Every contestant on every job, in turns; another one begins each time."""
    jobs = [list(range(len(clips)))] if options.batch_size else [[i] for i in range(len(clips))]
    labels = list(runners)
    heard: dict[str, dict[int, list[Any]]] = {label: {} for label in labels}
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    first: dict[str, list[float]] = {label: [] for label in labels}
    for run in runners.values():
        list(run([clips[0].audio[: 5 * SAMPLE_RATE]]))  # warm-up
    for turn in range(options.repeat * len(jobs)):
        job = jobs[turn % len(jobs)]
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            torch.manual_seed(0)  # the fallback samples
            parts: dict[int, list[Any]] = {place: [] for place in job}
            started, to_first = time.perf_counter(), None
            for place, part in runners[label]([clips[i].audio for i in job]):
                to_first = to_first or time.perf_counter() - started
                parts[job[place]].append(part)
            seconds[label].append(time.perf_counter() - started)
            first[label] += [] if to_first is None else [to_first]
            heard[label] |= parts
    rounds = {label: np.reshape(times, (options.repeat, len(jobs))).min(axis=0) for label, times in seconds.items()}
    return [
        tallied(
            label, heard[label], heard[labels[0]], clips, float(rounds[label].sum()), first[label], options.language
        )
        for label in labels
    ]


def tallied(
    label: str,
    heard: dict[int, list[Any]],
    ours: dict[int, list[Any]],
    clips: list[BenchClip],
    seconds: float,
    first: list[float],
    language: str | None,
) -> Tally:
    texts = ["".join(part.text for part in heard[i]).strip() for i in range(len(clips))]
    reference = ["".join(part.text for part in ours[i]).strip() for i in range(len(clips))]
    normal = normalizer("auto", language)
    counts = [count_words(normal(c.text), normal(text)) for c, text in zip(clips, texts) if c.text]
    same = sum(a == b for a, b in zip(texts, reference))
    return Tally(
        label=label,
        seconds=seconds,
        real_time_factor=seconds / (sum(len(c.audio) for c in clips) / SAMPLE_RATE),
        first_segment=statistics.median(first) if first else float("nan"),
        wer=error_rate(counts),
        missing=sum(c.deletions for c in counts),
        same_text=same,
        time_difference=time_difference(heard, ours) if same == len(clips) else None,
        texts=texts,
    )


def time_difference(a: dict[int, list[Any]], b: dict[int, list[Any]]) -> float | None:
    """The largest difference of a segment's or a word's time; None where the segments are not the same."""
    differences = [0.0]
    for place, parts in a.items():
        if [p.text for p in parts] != [p.text for p in b[place]]:
            return None
        for p, q in zip(parts, b[place]):
            for x, y in [(p, q), *zip(p.words or (), q.words or ())]:
                differences += [abs(x.start - y.start), abs(x.end - y.end)]
    return float(max(differences))


def peak_memory(contestant: Contestant, options: BenchOptions, audio: np.ndarray) -> float:
    """GiB (resident, of the host) of a process that does nothing but load the model and transcribe one recording."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, contestant, options, audio).result()


def _peak(contestant: Contestant, options: BenchOptions, audio: np.ndarray) -> float:
    if options.threads:
        torch.set_num_threads(options.threads)
    list(runner(load_contestant(contestant, options), options)([audio]))
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage counts what the parent held when it started this process
        (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---------------------------------------------------------------------------------------------------------- report


def environment(options: BenchOptions) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (OURS, "torch", "openai-whisper", "faster-whisper", "ctranslate2", "transformers", "silero-vad"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = device_of(options)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} ({chip})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "options": {name: value for name, value in asdict(options).items() if value not in (None, (), [])},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['device']}, {where['threads']} threads, Python {where['python']}; {versions}",
        "",
        "| windows | encode ms | prefill ms | tokens/s | encoder, of a product's FLOP/s | step, of a copy's bytes/s |",
        "|---|---|---|---|---|---|",
    ]
    for stages in report["stages"]:
        s = Throughput(**stages)
        step = "" if s.step_share is None else f"{s.step_share:.0%} of {report['copy_gb_per_second']:.1f} G"
        lines.append(
            f"| {s.windows} | {s.encode_ms:.1f} | {s.prefill_ms:.1f} | {1e3 * s.windows / s.step_ms:.0f} "
            f"| {s.encoder_share:.0%} of {report['matmul_tflops']:.2f} T | {step} |"
        )
    for title, section in report["sections"].items():
        ours = section["contestants"][0]
        batch = f"batches of {section['batch_size']}" if section["batch_size"] else "one at a time"
        lines += [
            "",
            f"{title}: {section['recordings']}, {section['minutes']:.1f} minutes, {batch}",
            "",
            f"| | seconds | x real time | RTF | time / {OURS}'s | first segment s | WER % | words missing "
            f"| text as {OURS} | largest time difference | peak GiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for t in section["contestants"]:
            difference = "" if t["time_difference"] is None else f"{t['time_difference']:.3f} s"
            errors = "" if math.isnan(t["wer"]) else f"{100 * t['wer']:.2f}"
            lines.append(
                f"| {t['label']} | {t['seconds']:.1f} | {1 / t['real_time_factor']:.1f} | {t['real_time_factor']:.4f} "
                f"| {t['seconds'] / ours['seconds']:.2f} | {t['first_segment']:.2f} | {errors} "
                f"| {t['missing']} | {t['same_text']} of {section['recordings']} | {difference} "
                f"| {t['peak_gib']:.2f} |"
            )
    return "\n".join(lines) + "\n"
