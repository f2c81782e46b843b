"""A recording, or many -> segments of text with times: OpenAI's sliding window over 30 seconds at a time.

Segments can be had as soon as they are known. With a `batch_size`, windows are cut at pauses instead, decoded many
at a time (batched.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH, N_FRAMES, N_SAMPLES, SAMPLE_RATE
from whisper.tokenizer import Tokenizer

from .audio import SampleReader, Source, is_samples, load_audio, pad_or_trim
from .batched import BatchedRecording, segments_of_one, transcribe_all
from .console import show
from .decoding import DecodingResult, language_code, model_tokenizer
from .front_end import hearings
from .model import Whisper
from .transcription import (
    NBest,
    Recording,
    Segment,
    TranscribeOptions,
    Transcription,
    clip_frames,
    collect,
    say,
    warn_of_translated_words,
)
from .vad import Chunk, Skip, VadOptions, cut, judged
from .window import (
    Prompt,
    Split,
    Window,
    decode_with_fallback,
    encode_window,
    last_word_end,
    leading_silence,
    log_mel,
    padded_frames,
    split_window,
    spoken,
    spoken_languages,
    without_silence,
)


@dataclass(frozen=True)
class OpenRecording:
    """A recording ready to be transcribed.

    mel: log-mel spectrograms [H, n_mels, frames + 3000] of its H hearings, 30 s of silence at their end.
    clips: the first and last frame of each part to transcribe.
    """

    mel: Tensor
    language: str
    tokenizer: Tokenizer
    clips: list[tuple[int, int]]
    skipped: list[Skip] = field(default_factory=list)
    n_best: list[NBest] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return self.mel.shape[-1] - N_FRAMES

    @property
    def duration(self) -> float:
        return self.frames * HOP_LENGTH / SAMPLE_RATE


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
    return transcribe_all(model, audio, made)


def transcribe_lazily(model: Whisper, audio: Source, **options: Any) -> tuple[Iterator[Segment], Recording]:
    """As `transcribe`, but a generator that yields each segment as soon as it is known, and what is known before.

    With a `batch_size` a recording's language and length are known when its segments are.
    """
    return segments_of(model, audio, TranscribeOptions.of(**options))


def segments_of(model: Whisper, audio: Source, options: TranscribeOptions) -> tuple[Iterator[Segment], Recording]:
    if options.batch_size is not None:
        batched = BatchedRecording(audio)
        return segments_of_one(model, batched, options), batched
    recording = open_recording(model, audio, options)
    return iter_segments(model, recording, options.speaking(recording.language)), recording


def open_recording(model: Whisper, audio: Source, options: TranscribeOptions) -> OpenRecording:
    """Decode the audio, compute its spectrogram, and find its language where that was not given."""
    clips = clip_frames(options.clip_timestamps)
    samples = load_audio(audio, track=options.audio_track)
    heard = np.stack([np.atleast_2d(each) for each in hearings([samples], options.hearing(), model.device)[0]])
    samples = heard[-1, -1]  # the detector of speech hears the cleanest
    mel = log_mel(model, torch.from_numpy(heard).to(model.device), padding=N_SAMPLES)
    frames = mel.shape[-1] - N_FRAMES
    parts = [(first, frames if last is None else min(last, frames)) for first, last in clips if first < frames]
    skipped: list[Skip] = []
    if options.vad_filter:
        parts, skipped = spoken_parts(samples, parts, options.vad)
        for skip in skipped:
            say(skip, options)
    language = options.decoding.language
    if language is None:
        language = first_language(model, samples, mel[0], parts, options)
    warn_of_translated_words(options)
    tokenizer = model_tokenizer(model, language, options.decoding.task)
    return OpenRecording(mel, language_code(language), tokenizer, parts, skipped)


def first_language(
    model: Whisper, samples: np.ndarray, mel: Tensor, parts: list[tuple[int, int]], options: TranscribeOptions
) -> str:
    """The language of the first speech in the parts (first and last frame)."""
    if not model.is_multilingual:
        return "en"
    if options.verbose:
        show("Detecting language using up to the first 30 seconds of speech. Use `--language` to specify the language")
    first, last = first_speech(samples, parts, options.vad)
    heard = pad_or_trim(mel if last >= mel.shape[-1] - N_FRAMES else mel[:, :last], mel.shape[-1])[:, first:]
    (language,) = spoken_languages(model, pad_or_trim(heard, padded_frames(model, last - first))[None], options)
    return language


def first_speech(samples: np.ndarray, parts: list[tuple[int, int]], vad: VadOptions) -> tuple[int, int]:
    """The first and last frame of the part that speech starts in, from there on; of the first part without any."""
    for first, last in parts:
        reader = SampleReader(samples[first * HOP_LENGTH : last * HOP_LENGTH])
        for piece in cut(judged(reader, None), 0, drop_silence=False, vad=vad):
            if isinstance(piece, Chunk) and (found := piece.from_speech()) is not None:
                return first + found.seek, last
    return parts[0] if parts else (0, len(samples) // HOP_LENGTH)


def spoken_parts(
    samples: np.ndarray, clips: list[tuple[int, int]], vad: VadOptions
) -> tuple[list[tuple[int, int]], list[Skip]]:
    """What is left of the clips (first and last frame) without the silence in them, and what was left out."""
    skips, parts = [], []
    for first, last in clips:
        reader = SampleReader(samples[first * HOP_LENGTH : last * HOP_LENGTH])
        offset = first * HOP_LENGTH / SAMPLE_RATE
        silent = [s for s in cut(judged(reader, None), 0, drop_silence=True, vad=vad) if isinstance(s, Skip)]
        silent = [Skip(s.start + offset, s.end + offset, s.why) for s in silent]
        edges = [round(t * FRAMES_PER_SECOND) for s in silent for t in (s.start, s.end)]
        borders = [first, *edges, last]
        parts += [(a, b) for a, b in zip(borders[::2], borders[1::2]) if b > a]
        skips += silent
    return parts, skips


def iter_segments(model: Whisper, recording: OpenRecording, options: TranscribeOptions) -> Iterator[Segment]:
    """The sliding window: decode 30 s, cut it into segments, go on where the last complete one ends."""
    prompt = Prompt.of(model, recording.tokenizer, options)
    last_speech, count = 0.0, 0
    with tqdm(total=recording.frames, unit="frames", disable=options.verbose is not False) as bar:
        for seek, last in recording.clips:
            while seek < (end := min(last, recording.frames)):
                window = Window(seek, min(N_FRAMES, end - seek))
                split, result = hear_window(model, recording, window, options, prompt, last_speech)
                recording.skipped.extend(split.skipped)
                recording.n_best.extend(split.n_best)
                if split.heard and result is not None:
                    last_speech = last_word_end(split.segments, default=last_speech)
                    split = replace(split, segments=spoken(split.segments, window))
                    prompt = prompt.after(split.segments, result, options)
                for skip in split.skipped:
                    say(skip, options)
                for segment in split.segments:
                    say(segment, options)
                    yield replace(segment, id=count)
                    count += 1
                seek = split.resume if split.resume > seek else window.end
                bar.update(min(seek, recording.frames) - window.seek)


def hear_window(
    model: Whisper,
    recording: OpenRecording,
    window: Window,
    options: TranscribeOptions,
    prompt: Prompt,
    last_speech: float,
) -> tuple[Split, DecodingResult | None]:
    """A window's segments, and what they were cut from where it was decoded."""
    (silent,) = leading_silence(recording.mel[:1, :, window.seek : window.end], [window.size])
    later = without_silence(window, silent)
    if later is not None:
        return later, None
    features = encode_window(model, recording.mel, window)
    if options.multilingual:
        language, *_ = spoken_languages(model, features, replace(options, verbose=None))
        options = options.speaking(language)
    hearing_of = [0] * len(features.primary)
    (result,) = decode_with_fallback(model, features, options, prompt.tokens(options), hearing_of)
    return split_window(model, recording, window, result, options, last_speech), result
