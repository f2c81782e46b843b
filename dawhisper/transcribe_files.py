"""Files in, files out: what `dawhisper transcribe` does."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .audio import load_audio
from .batched import readers_beside
from .bulk.devices import share
from .bulk.inputs import Input, find_inputs
from .bulk.outcomes import Outcome, transcribe_inputs
from .bulk.shards import Shard
from .bulk.summary import Summary
from .checkpoint import MODEL_HELP, OWN_MODEL, load_model
from .console import show
from .decoding import asked_language
from .device import DEVICES_HELP, DTYPE_HELP, DTYPE_NAMES, THREADS_HELP, choose_devices
from .errors import OptionError, one_line, unforeseen
from .files import replacing, writable_folder
from .hotwords import read_terms
from .model import Whisper
from .options import option
from .reading import Readers
from .speakers import Diarizer, pyannote_diarizer, with_speakers
from .transcription import Settings, TranscribeOptions, Transcription
from .writers import ONLY_BY_NAME, WRITERS

SMALLEST_INCREMENT = 0.01  # of the temperature


@dataclass(frozen=True)
class WriterOptions:
    """The format of the outputs, and how subtitles break into lines where there are word times."""

    output_format: str = option(
        "all", "what is written; all: txt, vtt, srt, tsv, json", short="-f", choices=[*WRITERS, "all"]
    )
    highlight_words: bool = option(False, "underline words as they are spoken (srt and vtt)")
    max_line_width: int | None = option(None, "characters in a line of subtitles")
    max_line_count: int | None = option(None, "lines in a subtitle")
    max_words_per_line: int | None = option(None, "words in a subtitle")

    def verify(self, word_timestamps: bool) -> None:
        for name, value in self.lines().items():
            if value is not None and value < 1 and name != "highlight_words":
                raise OptionError(f"--{name} is at least 1, not {value}")
            if value and not word_timestamps:
                raise OptionError(f"--{name} requires --word_timestamps True")
        if self.max_line_count and not self.max_line_width:
            warnings.warn("--max_line_count has no effect without --max_line_width", stacklevel=2)
        if self.max_words_per_line and self.max_line_width:
            warnings.warn("--max_words_per_line has no effect with --max_line_width", stacklevel=2)

    def lines(self) -> dict[str, Any]:
        names = ("highlight_words", "max_line_width", "max_line_count", "max_words_per_line")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class FilesOptions:
    """Which files are transcribed, by which model, and where the outputs go."""

    audio: Sequence[str] = option(
        help="audio or video files, folders, globs, addresses, manifests (.jsonl, .csv, .tsv), lists (.txt); - is "
        "standard input",
        positional=True,
    )
    recursive: bool = option(False, "folders with those below them; outputs in a tree like theirs", flag=True)
    skip_existing: bool = option(False, "leave out files whose outputs are there: go on after a stop", flag=True)
    summary: str | None = option(None, "add a line of JSON for each file to this one", metavar="FILE")
    shard: str | None = option(None, "do the Ith of N parts; auto: torchrun's or Slurm's", metavar="I/N")
    model: str = option(OWN_MODEL, MODEL_HELP)
    model_dir: str | None = option(None, "where downloaded models are kept; ~/.cache/whisper by default")
    device: str | None = option(None, DEVICES_HELP)
    fp16: bool = option(True, "compute in fp16 on a GPU; False in fp32, there and on a CPU")
    dtype: str | None = option(None, f"compute in this instead; {DTYPE_HELP}", choices=DTYPE_NAMES)
    int8_memory: bool = option(False, "on a GPU: keep the audio's keys and values in int8, faster")
    threads: int = option(0, THREADS_HELP)
    output_dir: str = option(".", "folder for the outputs", short="-o")
    diarize: bool = option(False, "tell who speaks, by pyannote.audio; turns on --word_timestamps")
    hf_token: str | None = option(None, "the token that pyannote's weights are given for; HF_TOKEN by default")
    num_speakers: int | None = option(None, "how many speak; found out by default")
    temperature: float = option(0.0, "temperature to sample with; 0 takes the likeliest text")
    temperature_increment_on_fallback: float | None = option(0.2, "step of the fallback's retries")


def transcribe_files(
    files: FilesOptions, writing: WriterOptions, options: dict[str, Any], report: Callable[[str], int]
) -> int:
    """Transcribe each file and write its outputs. A file that fails is reported and the others go on; returns 1 then.

    options: the arguments of `transcribe`, but for its temperatures. On Ctrl-C the outputs of what was transcribed so
    far are written first, under names of their own.
    """
    writing.verify(options.get("word_timestamps", False))
    temperatures = fallback_temperatures(files.temperature, files.temperature_increment_on_fallback)
    options = {**options, "temperature": temperatures, "hotwords": read_terms(options.get("hotwords"))}
    options["word_timestamps"] = options.get("word_timestamps", False) or files.diarize
    made = TranscribeOptions.of(**options)  # wrong options end here, before anything is loaded
    shard = Shard.of(files.shard)
    devices = choose_devices(files.device, shard.local)
    writable_folder(Path(files.output_dir))
    inputs = find_inputs(files.audio, files.recursive)
    summary = Summary(Path(files.summary) if files.summary else None)
    work = FilesWork(files, writing, made, len(devices))

    part = shard.part(inputs)
    done = dict.fromkeys(item for item in part if files.skip_existing and work.is_done(item))
    for item in done:
        summary.skip(item)
    failed = 0
    for outcome in work.on(devices, [item for item in part if item not in done]):
        summary.add(outcome)
        item = outcome.item
        if outcome.error:
            failed = report(outcome.error)
        elif outcome.interrupted:
            kept = work.folder / partial_name(item.output)
            failed = report(f"interrupted in {item.label}; what was transcribed until then is in {kept}.*")
        elif len(inputs) > 1 and made.verbose:
            show(f"{item.label}: {outcome.duration:.1f} s, {item.output}")
    told = summary.close()
    if len(inputs) > 1 or done:
        print(told, file=sys.stderr)
    return failed


@dataclass(frozen=True)
class FilesWork:
    """What is done with each file, here or in the processes of several devices."""

    files: FilesOptions
    writing: WriterOptions
    options: TranscribeOptions
    processes: int = 1

    @property
    def folder(self) -> Path:
        return Path(self.files.output_dir)

    def is_done(self, item: Input) -> bool:
        """Whether all outputs of a file are there."""
        return all(path.exists() for path in output_paths(item.output, self.folder, self.writing).values())

    def on(self, devices: Sequence[str], inputs: Sequence[Input]) -> Iterator[Outcome]:
        """What becomes of each file, once its outputs are written."""
        if not inputs:
            return
        if len(devices) > 1:
            yield from share(self, devices, inputs, readers_beside(len(devices)))
            return
        with closing(Readers(readers_beside(1))) as readers:
            if self.options.batch_size is not None and torch.device(devices[0]).type != "cpu":
                readers.expect([item.source for item in inputs])
            yield from self.run(self.load(devices[0]), inputs, readers)

    def load(self, device: str) -> Whisper:
        """The model on a device."""
        files = self.files
        if files.threads or self.processes > 1:
            torch.set_num_threads(files.threads or max(1, torch.get_num_threads() // self.processes))
        model = load_model(files.model, device, files.dtype or ("auto" if files.fp16 else "fp32"), files.model_dir)
        model.decoder.int8_memory = files.int8_memory  # type: ignore[assignment]
        return model

    def run(self, model: Whisper, inputs: Iterable[Input], readers: Readers | None = None) -> Iterator[Outcome]:
        """What becomes of each file, once its outputs are written."""
        language = usable_language(model, self.files.model, self.options.decoding.language)
        options = Settings(language).over(self.options)
        options = replace(options, multilingual=self.options.multilingual and model.is_multilingual)
        if self.processes > 1:
            options = replace(options, verbose=None)  # their lines would mix
        diarizer = None
        if self.files.diarize:
            diarizer = pyannote_diarizer(self.files.hf_token, model.device, self.files.num_speakers)
        for outcome in transcribe_inputs(model, inputs, options, readers):
            yield self.written(outcome if diarizer is None else told_apart(outcome, diarizer, options))

    def written(self, outcome: Outcome) -> Outcome:
        """The outcome, with what went wrong when its outputs were written."""
        name, label = outcome.item.output, outcome.item.label
        if outcome.result is None:
            return outcome
        try:
            write_outputs(
                outcome.result, partial_name(name) if outcome.interrupted else name, self.folder, self.writing
            )
        except OSError as error:
            return replace(outcome, error=f"can't write the output of {label}: {error.strerror or error}")
        except Exception as error:
            return replace(outcome, error=unforeseen(error, f"the output of {label}"))
        return outcome


def told_apart(outcome: Outcome, diarizer: Diarizer, options: TranscribeOptions) -> Outcome:
    """The outcome with its speakers; where they can't be told, it says so and has none."""
    if outcome.result is None:
        return outcome
    try:
        turns = diarizer(load_audio(outcome.item.source, track=options.audio_track))
        return replace(outcome, result=with_speakers(outcome.result, turns))
    except Exception as error:
        return replace(outcome, error=f"can't tell who speaks in {outcome.item.label}: {one_line(error)}")


def partial_name(name: str) -> str:
    """Of the outputs of a file that was not heard to its end; --skip_existing does not take them for the whole."""
    return f"{name}.partial"


def fallback_temperatures(temperature: float, increment: float | None) -> tuple[float, ...]:
    """temperature, temperature + increment, ... up to 1."""
    if increment is None:
        return (temperature,)
    if increment < SMALLEST_INCREMENT:
        raise OptionError(
            f"temperature_increment_on_fallback is above 0 (from {SMALLEST_INCREMENT} on), or None; not {increment}"
        )
    return tuple(np.arange(temperature, 1.0 + 1e-6, increment).tolist()) or (temperature,)


def usable_language(model: Whisper, name: str, language: str | None) -> str | None:
    """English for English-only models, whatever was asked for."""
    if model.is_multilingual:
        return language
    if asked_language(language) not in (None, "en"):
        warnings.warn(f"{name} knows English only; using English instead of {language}", stacklevel=2)
    return "en"


def write_outputs(result: Transcription, name: str, output_dir: Path, writing: WriterOptions) -> None:
    """Write a file's outputs, all of them or none."""
    with ExitStack() as stack:
        for output_format, path in output_paths(name, output_dir, writing).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = stack.enter_context(replacing(path))
            with part.open("w", encoding="utf-8") as file:
                writer = WRITERS[output_format](str(output_dir))
                writer.write_result(result.to_dict(), file, **writing.lines())


def output_paths(name: str, output_dir: Path, writing: WriterOptions) -> dict[str, Path]:
    """Where a file's output in each format goes."""
    every = [name for name in WRITERS if name not in ONLY_BY_NAME]
    formats = every if writing.output_format == "all" else [writing.output_format]
    return {each: output_dir / f"{name}.{WRITERS[each].extension}" for each in formats}
