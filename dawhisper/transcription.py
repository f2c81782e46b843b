"""What is asked of a transcription and what it answers: options, segments of text with times, results.

Times are in seconds. Options and results are openai-whisper's, and more.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND
from whisper.tokenizer import Tokenizer
from whisper.utils import format_timestamp

from .console import show
from .decoding import DecodingOptions, asked_language
from .errors import OptionError, near_names
from .front_end import FRONT_END_MIX, FRONT_END_SNR, FrontEnd
from .options import option
from .ranking import Alternative
from .timing import Word
from .vad import DEFAULT_VAD, Skip, VadOptions


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe a recording; the fields are the arguments of openai-whisper's `transcribe`.

    verbose: True prints segments as they come, False shows a progress bar, None is silent.
    temperature: tried in turn while a window's text is too repetitive (compression_ratio_threshold) or too unlikely
        (logprob_threshold, mean natural log probability).
    no_speech_threshold: windows whose no-speech probability is above it are silence, with a model that was not trained
        on noise alone (`knows_silence`) only if their text is unlikely.
    condition_on_previous_text: earlier text is the prompt of the next window.
    initial_prompt: prompt of the first window; carry_initial_prompt: of every window.
    word_timestamps: times for each word; prepend_ and append_punctuations are merged with the neighbouring word.
    clip_timestamps: "start,end,start,..." or a list, in seconds: the parts to transcribe.
    hallucination_silence_threshold: with word_timestamps, skip silences longer than this (seconds) around text that
        is likely made up.
    audio_track: which of a video's sound tracks, counted from 1; None is the default one.
    batch_size: windows decoded together; recordings are cut into them at pauses, and none is prompted with the text
        before it. None decodes one window after the other, each prompted with the text before it.
    multilingual: find out the language of each window, for people who switch; None may be given as the language then.
    vad_filter: leave out what the voice activity detector hears no speech in.
    vad: what counts as speech there, and how long windows are; its fields are given as vad_threshold and so on, or
        together as the dict `vad_parameters`.
    front_end: an enhancer that the recording goes through first, "deepfilternet" or a callable (front_end.py);
        front_end_mix: its share, between 0 and 1, of what is heard; two: of what each branch hears;
        front_end_snr: from so many dB of speech over noise on, as the enhancer hears it, all stays as it is;
        front_end_choose: hear what it changes as it is, too, and keep the likelier of each window's two texts.
    logprobs: give each segment's and word's tokens their log probabilities.
    decoding: the options of each window; its temperature and prompt are set by this loop.
    """

    verbose: bool | None = option(None, "True prints the text as it comes, False shows a progress bar")
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = option(2.4, "text more repetitive is retried")
    logprob_threshold: float | None = option(-1.0, "text less likely (mean log) is retried")
    no_speech_threshold: float | None = option(0.6, "above it unlikely text counts as silence")
    condition_on_previous_text: bool = option(True, "prompt each window with the text before it")
    initial_prompt: str | None = option(None, "text before the first window: names, spelling, style")
    carry_initial_prompt: bool = option(False, "prompt every window with initial_prompt")
    word_timestamps: bool = option(False, "times for each word")
    prepend_punctuations: str = option("\"'“¿([{-", "merged with the next word")
    append_punctuations: str = option("\"'.。,，!！?？:：”)]}、", "merged with the word before")
    clip_timestamps: str | Sequence[float] = option("0", "parts to transcribe: start,end,start,... in seconds")
    hallucination_silence_threshold: float | None = option(None, "skip silences longer than this (seconds)")
    audio_track: int | None = option(None, "which sound track of a video, counted from 1; the default one")
    batch_size: int | None = option(None, "windows, of all files, decoded together; None is one after the other")
    multilingual: bool = option(False, "find out the language of each window, not just the first")
    vad_filter: bool = option(False, "leave out what holds no voice (better with silero-vad)")
    logprobs: bool = option(False, "log probabilities of the tokens of segments and words (json)")
    front_end: str | Callable[[np.ndarray], np.ndarray] | None = option(  # noqa: RUF009 - a field, as all of them
        None, "clean the recording first", choices=["deepfilternet"]
    )
    front_end_mix: str | float | Sequence[float] = option(
        FRONT_END_MIX, "share of the cleaned recording, the rest stays as it is; 0,0.6: a share for each branch"
    )
    front_end_snr: float | None = option(
        FRONT_END_SNR, "dB of speech over noise, as the cleaner hears it, from which on all stays as it is; None: never"
    )
    front_end_choose: bool = option(
        False, "hear what is cleaned as it is, too, and keep the likelier text of each window: twice the work, in noise"
    )
    vad: VadOptions = DEFAULT_VAD
    decoding: DecodingOptions = field(default_factory=DecodingOptions)

    @classmethod
    def of(cls, **options: Any) -> TranscribeOptions:
        """From the flat keyword arguments of `transcribe`: these fields, those of DecodingOptions and of VadOptions."""
        own = {f.name for f in fields(cls)} - {"decoding", "vad"}
        window = {f.name for f in fields(DecodingOptions)} - own - {"prompt"}
        speech = {f"vad_{f.name}" for f in fields(VadOptions)}
        options |= {f"vad_{name}": value for name, value in (options.pop("vad_parameters", None) or {}).items()}
        for name, value in options.items():
            if name not in own | window | speech:
                raise OptionError(f"unknown option {name!r}{near_names(name, own | window | speech)}")
            options[name] = plain_number(name, value)
        decoding = DecodingOptions(**{k: v for k, v in options.items() if k in window})
        vad = VadOptions(**{k.removeprefix("vad_"): v for k, v in options.items() if k in speech})
        made = cls(decoding=decoding, vad=vad, **{k: v for k, v in options.items() if k in own})
        if made.batch_size is not None and made.batch_size < 1:
            raise OptionError(
                f"batch_size is at least 1, or None for one window after the other; not {made.batch_size}"
            )
        if made.audio_track is not None and made.audio_track < 1:
            raise OptionError(f"audio_track is counted from 1, not {made.audio_track}")
        if made.multilingual and decoding.language is not None:
            raise OptionError("multilingual finds out the language of each window; leave out `language`")
        for temperature in made.temperatures():
            made.at(temperature).verify()
        if (decoding.n_best or 1) > (decoding.beam_size or decoding.best_of or 1):
            raise OptionError(f"n_best {decoding.n_best} needs a beam_size as large, or best_of with a temperature")
        seek_points(made.clip_timestamps)
        made.hearing()
        return made

    def hearing(self) -> FrontEnd:
        """How recordings are heard. OptionError where they can't be heard so."""
        return FrontEnd(self.front_end, self.front_end_mix, self.front_end_snr, self.front_end_choose)

    def speaking(self, language: str) -> TranscribeOptions:
        """With the language of a recording."""
        return replace(self, decoding=replace(self.decoding, language=language))

    def temperatures(self) -> list[float]:
        given = self.temperature
        return [float(t) for t in ([given] if isinstance(given, (int, float)) else given)]

    def at(self, temperature: float, prompt: list[int] | None = None) -> DecodingOptions:
        """A window's options: beams at temperature 0, samples above it."""
        options = replace(self.decoding, temperature=temperature, prompt=prompt)
        if temperature > 0:
            return replace(options, beam_size=None, patience=None)
        return replace(options, best_of=None)


@dataclass(frozen=True)
class Settings:
    """What is asked of one recording otherwise than of the others, as in a manifest's row; None: as of the others."""

    language: str | None = None
    task: str | None = None
    initial_prompt: str | None = None
    clip_timestamps: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "language", asked_language(self.language))
        if self.task not in (None, "transcribe", "translate"):
            raise OptionError(f"unknown task {self.task!r}; use transcribe or translate")
        if not isinstance(self.initial_prompt, (str, type(None))):
            raise OptionError(f"a prompt is text, not {self.initial_prompt!r}")
        seek_points(self.clip_timestamps or "0")

    def over(self, options: TranscribeOptions) -> TranscribeOptions:
        """The others' options with these in their place."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        decoding = replace(options.decoding, **{k: given.pop(k) for k in ("language", "task") if k in given})
        multilingual = options.multilingual and self.language is None
        return replace(options, decoding=decoding, multilingual=multilingual, **given)

    @property
    def of_text(self) -> Settings:
        """Those that windows of one batch must have in common to be decoded at once."""
        return replace(self, clip_timestamps=None)


def plain_number(name: str, value: Any) -> Any:
    """A number as Python's own, from numpy's or torch's; OptionError for nan and inf. Other values stay as they are."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{name} is a number, not {value}")
    return value


@dataclass(frozen=True)
class NBest:
    """The best texts of one window, by how likely they are; of each what is said from `start` to `end` (seconds)."""

    start: float
    end: float
    alternatives: list[Alternative]


@dataclass(frozen=True)
class Segment:
    """A stretch of speech; `words` is None where no word times were asked for, as in all of a recording's segments.

    logprobs: the natural log probability of each of the tokens, speaker: who says it (speakers.py); None where they
        were not asked for.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None = None
    logprobs: list[float] | None = None
    speaker: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """openai-whisper's dict of this segment; what was not asked for is not in it."""
        made = present(self)
        if self.words is not None:
            made["words"] = [present(word) for word in self.words]
        return made


def present(made: Segment | Word) -> dict[str, Any]:
    """The fields that are not None, with lists of its own. (asdict would look at each token.)"""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(made).items()
        if value is not None
    }


@dataclass(frozen=True)
class Transcription(dict[str, Any]):
    """A recording's text, segments, language code, the parts that were skipped and why, and its windows' n best texts.

    It is also openai-whisper's dict: `result["text"]`, `result.get`, `json.dumps(result)`.
    """

    text: str
    segments: list[Segment]
    language: str
    skipped: list[Skip] = field(default_factory=list)
    n_best: list[NBest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.update(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """openai-whisper's dict; a segment that says nothing is not in it, and all have words or none has."""
        said = [segment for segment in self.segments if segment.text.strip()]
        if any(segment.words is None for segment in said):
            said = [replace(segment, words=None) for segment in said]
        segments = [segment.to_dict() for segment in said]
        skipped = [asdict(skip) for skip in self.skipped]
        made = {"text": self.text, "segments": segments, "language": self.language, "skipped": skipped}
        return made | ({"n_best": [asdict(each) for each in self.n_best]} if self.n_best else {})


class Recording(Protocol):
    """What is known of a recording while it is transcribed; `skipped` and `n_best` grow."""

    @property
    def duration(self) -> float:
        """In seconds; when batched, of what was read so far."""

    @property
    def language(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def skipped(self) -> list[Skip]: ...

    @property
    def n_best(self) -> list[NBest]: ...


def collect(segments: Iterable[Segment], recording: Recording) -> Transcription:
    """All segments, as a Transcription."""
    kept = list(segments)
    text = recording.tokenizer.decode([token for segment in kept for token in segment.tokens])
    skipped = sorted(recording.skipped, key=lambda skip: skip.start)
    n_best = sorted(recording.n_best, key=lambda window: window.start)
    return Transcription(text, kept, recording.language, skipped, n_best)


def warn_of_translated_words(options: TranscribeOptions) -> None:
    if options.word_timestamps and options.decoding.task == "translate":
        warnings.warn("Word-level timestamps on translations may not be reliable.", stacklevel=2)


def clip_frames(timestamps: str | Sequence[float]) -> list[tuple[int, int | None]]:
    """First and last frame of each part to transcribe; None is the recording's end."""
    points = seek_points(timestamps)
    return list(itertools.zip_longest(points[::2], points[1::2]))


def seek_points(timestamps: str | Sequence[float]) -> list[int]:
    """Frames of "start,end,start,..." in seconds."""
    try:
        given = timestamps.split(",") if isinstance(timestamps, str) else timestamps
        seconds = [float(t) for t in given if t != ""]
    except (TypeError, ValueError):
        raise OptionError(f"clip_timestamps is start,end,start,... in seconds, not {timestamps!r}") from None
    if any(b < a for a, b in itertools.pairwise(seconds)) or not all(0 <= t < math.inf for t in seconds):
        raise OptionError(f"clip_timestamps are seconds that neither go back nor below 0, not {timestamps!r}")
    return [round(t * FRAMES_PER_SECOND) for t in seconds] or [0]


def say(heard: Segment | Skip, options: TranscribeOptions) -> None:
    """Print a segment, or what was skipped, where that was asked for."""
    if options.verbose and not (isinstance(heard, Segment) and not heard.text):
        show(printable(heard))


def printable(heard: Segment | Skip) -> str:
    text = heard.text if isinstance(heard, Segment) else f" (skipped: {heard.why})"
    return f"[{format_timestamp(heard.start)} --> {format_timestamp(heard.end)}] {text}"
