"""A recording, or many -> segments of text with times: OpenAI's sliding window over 30 seconds at a time.

Times are in seconds, `seek` positions in mel frames of 10 ms. The behaviour is openai-whisper's; what differs is that
a window is encoded once, however often it is decoded, and that segments can be had as soon as they are known. With a
`batch_size`, windows are cut at pauses instead and decoded many at a time (batched.py).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH, N_FRAMES, N_SAMPLES, SAMPLE_RATE
from whisper.tokenizer import LANGUAGES, Tokenizer
from whisper.utils import format_timestamp

from .audio import SampleReader, Source, is_samples, load_audio, log_mel_spectrogram, pad_or_trim
from .console import show
from .decoding import DecodingOptions, DecodingResult, decode_windows, detect_language, language_code, model_tokenizer
from .errors import OptionError, near_names
from .model import AudioFeatures, Whisper
from .timing import TimedText, Word, add_word_times
from .vad import Skip, cut

PUNCTUATION = "\"'“¿([{-\"'.。,，!！?？:：”)]}、"


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
    vad_filter: leave out what the voice activity detector hears no speech in.
    decoding: the options of each window; its temperature and prompt are set by this loop.
    """

    verbose: bool | None = None
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    condition_on_previous_text: bool = True
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    word_timestamps: bool = False
    prepend_punctuations: str = "\"'“¿([{-"
    append_punctuations: str = "\"'.。,，!！?？:：”)]}、"
    clip_timestamps: str | Sequence[float] = "0"
    hallucination_silence_threshold: float | None = None
    audio_track: int | None = None
    batch_size: int | None = None
    vad_filter: bool = False
    decoding: DecodingOptions = field(default_factory=DecodingOptions)

    @classmethod
    def of(cls, **options: Any) -> TranscribeOptions:
        """From the flat keyword arguments of `transcribe`: these fields and those of DecodingOptions."""
        own = {f.name for f in fields(cls)} - {"decoding"}
        window = {f.name for f in fields(DecodingOptions)} - own - {"prompt"}
        for name, value in options.items():
            if name not in own | window:
                raise OptionError(f"unknown option {name!r}{near_names(name, own | window)}")
            options[name] = plain_number(name, value)
        decoding = DecodingOptions(**{k: v for k, v in options.items() if k in window})
        made = cls(decoding=decoding, **{k: v for k, v in options.items() if k in own})
        if made.batch_size is not None and made.batch_size < 1:
            raise OptionError(
                f"batch_size is at least 1, or None for one window after the other; not {made.batch_size}"
            )
        if made.audio_track is not None and made.audio_track < 1:
            raise OptionError(f"audio_track is counted from 1, not {made.audio_track}")
        for temperature in made.temperatures():
            made.at(temperature).verify()
        seek_points(made.clip_timestamps)
        return made

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


def plain_number(name: str, value: Any) -> Any:
    """A number as Python's own, from numpy's or torch's; OptionError for nan and inf. Other values stay as they are."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{name} is a number, not {value}")
    return value


@dataclass(frozen=True)
class Segment:
    """A stretch of speech; `words` is None where no word times were asked for."""

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

    def to_dict(self) -> dict[str, Any]:
        """openai-whisper's dict of this segment."""
        made = asdict(self)
        if self.words is None:
            del made["words"]
        return made


@dataclass(frozen=True)
class Transcription:
    """A recording's text, segments, language code, and the parts that were skipped and why.

    `result["text"]` works as with openai-whisper's dict.
    """

    text: str
    segments: list[Segment]
    language: str
    skipped: list[Skip] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        segments = [segment.to_dict() for segment in self.segments]
        skipped = [asdict(skip) for skip in self.skipped]
        return {"text": self.text, "segments": segments, "language": self.language, "skipped": skipped}

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]


class Recording(Protocol):
    """What is known of a recording while it is transcribed; `skipped` grows."""

    @property
    def duration(self) -> float:
        """In seconds; when batched, of what was read so far."""

    @property
    def language(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def skipped(self) -> list[Skip]: ...


@dataclass(frozen=True)
class OpenRecording:
    """A recording ready to be transcribed: its log-mel [n_mels, frames + 3000], 30 s of silence at its end."""

    mel: Tensor
    language: str
    tokenizer: Tokenizer
    clips: list[tuple[int, int]]  # first and last frame of each part to transcribe
    skipped: list[Skip] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return self.mel.shape[-1] - N_FRAMES

    @property
    def duration(self) -> float:
        return self.frames * HOP_LENGTH / SAMPLE_RATE


@dataclass(frozen=True)
class Window:
    """Up to 30 s of a recording: `size` frames from frame `seek` on."""

    seek: int
    size: int

    @property
    def start(self) -> float:
        return self.seek * HOP_LENGTH / SAMPLE_RATE

    @property
    def duration(self) -> float:
        return self.size * HOP_LENGTH / SAMPLE_RATE

    @property
    def end(self) -> int:
        return self.seek + self.size

    def skip(self, why: str) -> Split:
        """This window as one that counts as not heard."""
        return Split([], self.end, heard=False, skipped=(Skip(self.start, self.start + self.duration, why),))

    @property
    def end_of_30s(self) -> float:
        return (self.seek + N_FRAMES) * HOP_LENGTH / SAMPLE_RATE


@dataclass(frozen=True)
class Split:
    """What a window gave: its segments, and the frame where the next window starts.

    at_end: the text says that nothing is spoken after its last timestamp; heard: its text leads the next window's.
    """

    segments: list[Segment]
    resume: int
    at_end: bool = False
    heard: bool = True
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The earlier text that a window is decoded with: the tokens given at first, and those decoded lately."""

    initial: list[int]
    recent: list[int]
    room: int
    was_reset: bool = False

    @classmethod
    def of(cls, model: Whisper, tokenizer: Tokenizer, options: TranscribeOptions) -> Prompt:
        text = options.initial_prompt
        return cls(
            tokenizer.encode(" " + text.strip(), disallowed_special=()) if text else [],
            [],
            model.dims.n_text_ctx // 2 - 1,
        )

    def tokens(self, options: TranscribeOptions) -> list[int]:
        if options.carry_initial_prompt:
            room = self.room - len(self.initial)
            return self.initial + (self.recent[-room:] if room > 0 else [])
        return self.recent if self.was_reset else self.initial + self.recent

    def after(self, segments: list[Segment], result: DecodingResult, options: TranscribeOptions) -> Prompt:
        # text sampled at a high temperature would lead the next window astray
        if not options.condition_on_previous_text or result.temperature > 0.5:
            return replace(self, recent=[], was_reset=True)
        said = self.recent + [token for segment in segments for token in segment.tokens]
        return replace(self, recent=said[-self.room :])


def transcribe(model: Whisper, audio: Source | Sequence[Source], **options: Any) -> Transcription | list[Transcription]:
    """Transcribe a recording: whatever `load_audio` takes, a file or samples at 16 kHz. A list of them gives a list.

    Keyword arguments are the fields of TranscribeOptions and DecodingOptions. With a `batch_size`, the windows of a
    list's recordings fill batches together. Raises AudioError for audio that can't be used and OptionError for options
    that can't.
    """
    made = TranscribeOptions.of(**options)
    if not isinstance(audio, (list, tuple)) or is_samples(audio):
        segments, recording = segments_of(model, audio, made)  # type: ignore[arg-type]
        return collect(segments, recording)
    if made.batch_size is None:
        return [collect(*segments_of(model, one, made)) for one in audio]
    from .batched import transcribe_all

    return transcribe_all(model, audio, made)


def transcribe_lazily(model: Whisper, audio: Source, **options: Any) -> tuple[Iterator[Segment], Recording]:
    """As `transcribe`, but a generator that yields each segment as soon as it is known, and what is known before.

    With a `batch_size` a recording's language and length are known when its segments are.
    """
    return segments_of(model, audio, TranscribeOptions.of(**options))


def segments_of(model: Whisper, audio: Source, options: TranscribeOptions) -> tuple[Iterator[Segment], Recording]:
    if options.batch_size is not None:
        from .batched import BatchedRecording, segments_of_one

        batched = BatchedRecording(audio)
        return segments_of_one(model, batched, options), batched
    recording = open_recording(model, audio, options)
    return iter_segments(model, recording, options.speaking(recording.language)), recording


def collect(segments: Iterable[Segment], recording: Recording) -> Transcription:
    """All segments, as a Transcription."""
    kept = list(segments)
    text = recording.tokenizer.decode([token for segment in kept for token in segment.tokens])
    return Transcription(text, kept, recording.language, sorted(recording.skipped, key=lambda skip: skip.start))


def open_recording(model: Whisper, audio: Source, options: TranscribeOptions) -> OpenRecording:
    """Decode the audio, compute its spectrogram, and find its language where that was not given."""
    clips = clip_frames(options.clip_timestamps)
    samples = load_audio(audio, track=options.audio_track)
    mel = log_mel_spectrogram(samples, model.dims.n_mels, padding=N_SAMPLES, device=model.device)
    language = options.decoding.language
    if language is None:
        if model.is_multilingual and options.verbose:
            print("Detecting language using up to the first 30 seconds. Use `--language` to specify the language")
        heard = padded_frames(model, mel.shape[-1] - N_FRAMES)
        (language,) = spoken_languages(model, pad_or_trim(mel, heard)[None], options)
    warn_of_translated_words(options)
    tokenizer = model_tokenizer(model, language, options.decoding.task)
    ended = [(first, mel.shape[-1] - N_FRAMES if last is None else last) for first, last in clips]
    if not options.vad_filter:
        return OpenRecording(mel, language_code(language), tokenizer, ended)
    voiced, skipped = spoken_parts(samples, ended)
    for skip in skipped:
        say(skip, options)
    return OpenRecording(mel, language_code(language), tokenizer, voiced, skipped)


def spoken_languages(model: Whisper, audio: Tensor | AudioFeatures, options: TranscribeOptions) -> list[str]:
    """Language codes of windows [B, ..]; English for a model that knows no other."""
    if not model.is_multilingual:
        return ["en"] * len(audio if isinstance(audio, Tensor) else audio.primary)
    _, probs = detect_language(model, audio)
    languages = [max((p, code) for code, p in each.items())[1] for each in probs]  # type: ignore[union-attr]
    if options.verbose is not None:
        for language in languages:
            show(f"Detected language: {LANGUAGES[language].title()}")
    return languages


def warn_of_translated_words(options: TranscribeOptions) -> None:
    if options.word_timestamps and options.decoding.task == "translate":
        warnings.warn("Word-level timestamps on translations may not be reliable.", stacklevel=2)


def spoken_parts(samples: np.ndarray, clips: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[Skip]]:
    """What is left of the clips (first and last frame) without the silence in them, and what was left out."""
    skips, parts = [], []
    for first, last in clips:
        reader = SampleReader(samples[first * HOP_LENGTH : last * HOP_LENGTH])
        offset = first * HOP_LENGTH / SAMPLE_RATE
        silent = [s for s in cut(reader, None, drop_silence=True) if isinstance(s, Skip)]
        silent = [Skip(s.start + offset, s.end + offset, s.why) for s in silent]
        edges = [round(t * FRAMES_PER_SECOND) for s in silent for t in (s.start, s.end)]
        borders = [first, *edges, last]
        parts += [(a, b) for a, b in zip(borders[::2], borders[1::2]) if b > a]
        skips += silent
    return parts, skips


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


def iter_segments(model: Whisper, recording: OpenRecording, options: TranscribeOptions) -> Iterator[Segment]:
    """The sliding window: decode 30 s, cut it into segments, go on where the last complete one ends."""
    prompt = Prompt.of(model, recording.tokenizer, options)
    last_speech, count = 0.0, 0
    with tqdm(total=recording.frames, unit="frames", disable=options.verbose is not False) as bar:
        for seek, last in recording.clips:
            while seek < (end := min(last, recording.frames)):
                window = Window(seek, min(N_FRAMES, end - seek))
                split, result = hear(model, recording, window, options, prompt, last_speech)
                recording.skipped.extend(split.skipped)
                if split.heard and result is not None:
                    last_speech = last_word_end(split.segments, default=last_speech)
                    split = replace(split, segments=[without_empty(segment) for segment in split.segments])
                    prompt = prompt.after(split.segments, result, options)
                for skip in split.skipped:
                    say(skip, options)
                for segment in split.segments:
                    say(segment, options)
                    yield replace(segment, id=count)
                    count += 1
                seek = split.resume if split.resume > seek else window.end
                bar.update(min(seek, recording.frames) - window.seek)


def hear(
    model: Whisper,
    recording: OpenRecording,
    window: Window,
    options: TranscribeOptions,
    prompt: Prompt,
    last_speech: float,
) -> tuple[Split, DecodingResult | None]:
    """A window's segments, and what they were cut from where it was decoded."""
    if not is_audible(recording.mel[:, window.seek : window.end]):
        return window.skip("digital silence"), None
    features = encode_window(model, recording.mel, window)
    (result,) = decode_with_fallback(model, features, options, prompt.tokens(options))
    return split_window(model, recording, window, result, options, last_speech), result


def split_window(
    model: Whisper,
    recording: Recording,
    window: Window,
    result: DecodingResult,
    options: TranscribeOptions,
    last_speech: float,
) -> Split:
    """What a decoded window gave, with words where they are asked for."""
    if is_silence(model, result, options):
        return window.skip("no speech")
    split = split_segments(result, window, model, recording.tokenizer)
    if not options.word_timestamps:
        return split
    features = AudioFeatures(*(x[None] for x in result.audio_features))
    return with_words(split, model, recording, features, window, last_speech, options)


def is_audible(mel: Tensor) -> bool:
    """Whether anything in the window [n_mels, frames] rises above the spectrogram's floor, 80 dB below the maximum.

    In digital silence openai-whisper hears "you"; this is the one place where we differ from it.
    """
    low, high = mel.aminmax()
    return bool(low < high)


def encode_window(model: Whisper, mel: Tensor, window: Window) -> AudioFeatures:
    """Features [1, T, d] of a window."""
    audio = pad_or_trim(mel[:, window.seek : window.end], padded_frames(model, window.size))
    with torch.no_grad():
        return model.encode(audio[None].to(model.device, model.dtype))


def padded_frames(model: Whisper, size: int) -> int:
    """How many frames to encode for `size` frames of audio: 30 s, or less where the model was trained for it.

    Then whole seconds with at least one of silence: without it decoding runs into loops (3 of 60 LibriSpeech clips, WER
    24.6% against 5.1%, with the first checkpoint that was trained so).
    """
    if not model.variable_audio_ctx:
        return N_FRAMES
    return min(N_FRAMES, (-(-size // FRAMES_PER_SECOND) + 1) * FRAMES_PER_SECOND)


def mel_batch(model: Whisper, clips: Sequence[np.ndarray]) -> Tensor:
    """Clips of at most 30 s -> [B, n_mels, N] on the model's device, N the `padded_frames` of the longest."""
    length = padded_frames(model, -(-max(map(len, clips)) // HOP_LENGTH)) * HOP_LENGTH
    audio = np.stack([pad_or_trim(clip, length) for clip in clips])
    return log_mel_spectrogram(audio, model.dims.n_mels, device=model.device)


def decode_with_fallback(
    model: Whisper, features: AudioFeatures, options: TranscribeOptions, prompt: list[int]
) -> list[DecodingResult]:
    """Decode windows [B, T, d] at each temperature in turn, those alone whose text is too repetitive or unlikely."""
    results: dict[int, DecodingResult] = {}
    failing = list(range(len(features.primary)))
    for temperature in options.temperatures():
        decoded = decode_windows(model, pick(features, failing), options.at(temperature, prompt))
        results.update(zip(failing, decoded))
        failing = [i for i in failing if needs_fallback(model, results[i], options)]
        if not failing:
            break
    return [results[i] for i in sorted(results)]


def pick(features: AudioFeatures, windows: list[int]) -> AudioFeatures:
    """Some windows of a batch, without a copy where they are all of it."""
    if len(windows) == len(features.primary):
        return features
    primary = features.primary[windows]
    return AudioFeatures(primary, primary if features.secondary is features.primary else features.secondary[windows])


def needs_fallback(model: Whisper, result: DecodingResult, options: TranscribeOptions) -> bool:
    believed = model.knows_silence or unlikely(result, options)
    if believed and exceeds(result.no_speech_prob, options.no_speech_threshold):
        return False  # silence
    return unlikely(result, options) or exceeds(result.compression_ratio, options.compression_ratio_threshold)


def is_silence(model: Whisper, result: DecodingResult, options: TranscribeOptions) -> bool:
    """No speech is probable, and the text does not speak against it by being likely.

    Where the model was trained on noise alone the text has no say: stock Whisper's no-speech probability needs its
    help, and is 0.33 to 0.75 in noise, a trained one's 0.72 to 0.999, and below 0.2 in speech, noisy or not.
    """
    if not exceeds(result.no_speech_prob, options.no_speech_threshold):
        return False
    return model.knows_silence or not exceeds(result.avg_logprob, options.logprob_threshold)


def unlikely(result: DecodingResult, options: TranscribeOptions) -> bool:
    return options.logprob_threshold is not None and result.avg_logprob < options.logprob_threshold


def exceeds(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold


def split_segments(result: DecodingResult, window: Window, model: Whisper, tokenizer: Tokenizer) -> Split:
    """Cut a window's tokens at its pairs of timestamps; an unfinished segment at its end is left to the next window."""
    stride = N_FRAMES // model.dims.n_audio_ctx  # mel frames per timestamp: 2
    precision = stride * HOP_LENGTH / SAMPLE_RATE  # seconds per timestamp: 0.02
    tokens, begin = result.tokens, tokenizer.timestamp_begin
    is_time = [token >= begin for token in tokens]
    at_end = is_time[-2:] == [False, True]

    def segment(tokens: list[int], start: float, end: float) -> Segment:
        text = tokenizer.decode([token for token in tokens if token < tokenizer.eot])
        return Segment(
            id=0,
            seek=window.seek,
            start=start,
            end=end,
            text=text,
            tokens=tokens,
            temperature=result.temperature,
            avg_logprob=result.avg_logprob,
            compression_ratio=result.compression_ratio,
            no_speech_prob=result.no_speech_prob,
        )

    cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not cuts:  # one segment, to its last timestamp or to the window's end
        times = [token for token in tokens if token >= begin]
        duration = (times[-1] - begin) * precision if times and times[-1] != begin else window.duration
        only = segment(tokens, window.start, window.start + duration)
        return Split([only], window.seek + window.size, at_end)
    if at_end:
        cuts.append(len(tokens))
    pieces = [tokens[i:j] for i, j in zip([0, *cuts], cuts)]
    segments = [
        segment(piece, window.start + (piece[0] - begin) * precision, window.start + (piece[-1] - begin) * precision)
        for piece in pieces
    ]
    resume = window.seek + (window.size if at_end else (pieces[-1][-1] - begin) * stride)
    return Split(segments, resume, at_end)


def without_empty(segment: Segment) -> Segment:
    """A segment that takes no time or has no text keeps its place, but says nothing."""
    if segment.start == segment.end or not segment.text.strip():
        return replace(segment, text="", tokens=[], words=[])
    return segment


def say(heard: Segment | Skip, options: TranscribeOptions) -> None:
    """Print a segment, or what was skipped, where that was asked for."""
    if options.verbose and not (isinstance(heard, Segment) and not heard.text):
        show(printable(heard))


def printable(heard: Segment | Skip) -> str:
    text = heard.text if isinstance(heard, Segment) else f" (skipped: {heard.why})"
    return f"[{format_timestamp(heard.start)} --> {format_timestamp(heard.end)}] {text}"


# ---------------------------------------------------------------------------------------- word times in long form


def last_word_end(segments: list[Segment], default: float) -> float:
    """Where the last word ends, in seconds; without words, where the last segment does."""
    ends = [word.end for segment in segments for word in segment.words or []]
    return ends[-1] if ends else segments[-1].end if segments else default


def with_words(
    split: Split,
    model: Whisper,
    recording: Recording,
    features: AudioFeatures,
    window: Window,
    last_speech: float,
    options: TranscribeOptions,
) -> Split:
    """Give the segments their words, go on after the last of them, and drop what is likely made up in silence."""
    eot = recording.tokenizer.eot
    texts = [TimedText([t for t in s.tokens if t < eot], s.start, s.end) for s in split.segments]
    timed = add_word_times(
        texts,
        model,
        recording.tokenizer,
        features,
        window.size,
        window.start,
        last_speech,
        options.prepend_punctuations,
        options.append_punctuations,
    )
    segments = [replace(s, start=t.start, end=t.end, words=list(t.words)) for s, t in zip(split.segments, timed)]
    split = replace(split, segments=segments)
    spoken_until = last_word_end(segments, default=window.start)
    threshold = options.hallucination_silence_threshold
    if not split.at_end and spoken_until > window.start:
        resume = round(spoken_until * FRAMES_PER_SECOND)
        if threshold is not None and window.end_of_30s - spoken_until <= threshold:
            resume = window.seek + window.size
        split = replace(split, resume=resume)
    return split if threshold is None else without_hallucinations(split, window, recording, last_speech, threshold)


def without_hallucinations(
    split: Split, window: Window, recording: Recording, last_speech: float, threshold: float
) -> Split:
    """Skip silences longer than `threshold` seconds before improbable segments, and such segments within silence."""
    segments = split.segments
    first = next((s for s in segments if s.words), None)
    if first is not None and is_anomalous(first) and first.start - window.start > threshold:
        silence = Skip(window.start, first.start, "silence before improbable text")
        resume = window.seek + round((first.start - window.start) * FRAMES_PER_SECOND)
        return Split([], resume, heard=False, skipped=(silence,))

    heard_until = last_speech
    for i, segment in enumerate(segments):
        if not segment.words:
            continue
        if is_anomalous(segment):
            following = next((s for s in segments[i + 1 :] if s.words), None)
            next_start = following.words[0].start if following and following.words else window.start + window.duration
            silent_before = (
                segment.start - heard_until > threshold
                or segment.start < threshold
                or segment.start - window.start < 2.0
            )
            silent_after = (
                next_start - segment.end > threshold
                or (following is not None and is_anomalous(following))
                or window.end_of_30s - segment.end < 2.0
            )
            if silent_before and silent_after:
                resume, skipped = round(max(window.start + 1, segment.start) * FRAMES_PER_SECOND), split.skipped
                if recording.duration - segment.end < threshold:
                    resume = round(recording.duration * FRAMES_PER_SECOND)
                    skipped = (Skip(segment.start, recording.duration, "improbable text in silence"),)
                return replace(split, segments=segments[:i], resume=resume, skipped=skipped)
        heard_until = segment.end
    return split


def is_anomalous(segment: Segment) -> bool:
    """Whether the first words are too improbable, too short or too long to have been spoken."""
    words = [word for word in segment.words or [] if word.word not in PUNCTUATION][:8]
    score = sum(word_anomaly(word) for word in words)
    return bool(segment.words) and (score >= 3 or score + 0.01 >= len(words))


def word_anomaly(word: Word) -> float:
    duration = word.end - word.start
    return (word.probability < 0.15) + max(0.0, 0.133 - duration) * 15 + max(0.0, duration - 2.0)
