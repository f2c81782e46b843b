"""What one window of 30 s gives: features, tokens with their fallback, silence, segments, words.

Times are in seconds, `seek` positions in mel frames of 10 ms. The behaviour is openai-whisper's; what differs is that a
window is encoded once, however often it is decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH, N_FRAMES, SAMPLE_RATE
from whisper.tokenizer import LANGUAGES, Tokenizer

from .audio import log_mel_spectrogram, pad_or_trim
from .console import show
from .decoding import DecodingOptions, DecodingResult, decode_windows, detect_language, encode_text, model_tokenizer
from .errors import OptionError
from .model import AudioFeatures, Whisper
from .ranking import Alternative
from .timing import TimedText, Word, add_word_times, find_alignment
from .transcription import NBest, Recording, Segment, TranscribeOptions
from .vad import Skip

LATEST_FIRST_WORD = 100  # frames, 1 s: Whisper says of no first words that they start later in a window
BEFORE_SOUND = 10  # frames of silence that are left before a sound
SHORTEST_SEGMENT = 0.1  # seconds of a segment that the model put behind the recording's end
PUNCTUATION = "\"'“¿([{-\"'.。,，!！?？:：”)]}、"


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
    n_best: tuple[NBest, ...] = ()


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
            encode_text(tokenizer, text) if text else [],
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


def split_window(
    model: Whisper,
    recording: Recording,
    window: Window,
    result: DecodingResult,
    options: TranscribeOptions,
    last_speech: float,
) -> Split:
    """What a decoded window gave, with words where they are asked for.

    last_speech: the end of the last word before it, in seconds.
    """
    if is_silence(model, result, options):
        return window.skip("no speech")
    tokenizer = model_tokenizer(model, result.language, options.decoding.task)
    split = split_segments(result, window, model, tokenizer, options.logprobs)
    if options.word_timestamps:
        features = AudioFeatures(*(x[None] for x in result.audio_features))
        texts = [timed_text(segment, tokenizer.eot) for segment in split.segments]
        tokens = [token for text in texts for token in text.tokens]
        alignment = find_alignment(model, tokenizer, tokens, features, window.size)
        punctuations = options.prepend_punctuations, options.append_punctuations
        timed = add_word_times(texts, alignment, window.start, last_speech, *punctuations)
        threshold = options.hallucination_silence_threshold
        split = with_words(split, timed, window, threshold)
        if threshold is not None:
            split = without_hallucinations(split, window, recording, last_speech, threshold)
    return replace(split, n_best=n_best_until(split.resume, result, window, model, tokenizer))


def n_best_until(
    resume: int, result: DecodingResult, window: Window, model: Whisper, tokenizer: Tokenizer
) -> tuple[NBest, ...]:
    """The window's alternatives, without what starts at frame `resume` or later, which the next window hears again."""
    if not result.alternatives:
        return ()
    latest = tokenizer.timestamp_begin + (resume - window.seek) // (N_FRAMES // model.dims.n_audio_ctx)
    texts: dict[str, Alternative] = {}
    for each in result.alternatives:
        beyond = (i for i, token in enumerate(each.tokens[1:], 1) if token >= latest and each.tokens[i - 1] >= latest)
        tokens = each.tokens[: next(beyond, None)]
        text = tokenizer.decode(tokens).strip()
        texts.setdefault(text, replace(each, tokens=tokens, text=text))
    end = min(resume, window.end) / FRAMES_PER_SECOND
    return (NBest(window.start, end, list(texts.values())),)


def leading_silence(mel: Tensor, sizes: Sequence[int]) -> list[int]:
    """Frames at the start of each window [B, n_mels, frames], which has so many frames of sound, in which nothing rises
    above the spectrogram's floor, 80 dB below the maximum.

    In digital silence openai-whisper hears "you", and puts the first words behind it into it; here we differ from it.
    """
    behind = frames_behind(mel, sizes)
    lowest, highest = mel.aminmax(dim=1)  # of each frame
    floor = lowest.masked_fill(behind, torch.inf).amin(dim=1, keepdim=True)
    audible = (highest > floor) & ~behind
    first = audible.int().argmax(dim=1).where(audible.any(dim=1), -1).tolist()  # the GPU is waited for once
    return [size if frame < 0 else frame for frame, size in zip(first, sizes)]


def frames_behind(mel: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which frames [B, frames] of windows [B, n_mels, frames] come after their sound."""
    return torch.arange(mel.shape[-1], device=mel.device) >= torch.tensor(sizes, device=mel.device)[:, None]


def without_silence(window: Window, silent: int) -> Split | None:
    """The window as one to be heard later, from where its sound starts; None where that is at its beginning."""
    if silent == window.size:
        return window.skip("digital silence")
    if silent <= LATEST_FIRST_WORD:
        return None
    resume = window.seek + silent - BEFORE_SOUND
    skip = Skip(window.start, resume / FRAMES_PER_SECOND, "digital silence")
    return Split([], resume, heard=False, skipped=(skip,))


def encode_window(model: Whisper, mel: Tensor, window: Window) -> AudioFeatures:
    """Features [H, T, d] of a window of spectrograms [H, n_mels, frames], the hearings of a recording."""
    return encode_batch(model, pad_or_trim(mel[..., window.seek : window.end], padded_frames(model, window.size)))


def padded_frames(model: Whisper, size: int) -> int:
    """How many frames to encode for `size` frames of audio: 30 s, or less where the model was trained for it.

    Then whole seconds with at least one of silence: without it decoding runs into loops (3 of 60 LibriSpeech clips, WER
    24.6% against 5.1%, with the first checkpoint that was trained so).
    """
    longest = 2 * model.dims.n_audio_ctx
    if not model.variable_audio_ctx:
        return longest
    return min(longest, (-(-size // FRAMES_PER_SECOND) + 1) * FRAMES_PER_SECOND)


def mel_batch(model: Whisper, clips: Sequence[np.ndarray]) -> Tensor:
    """Clips [n] of at most 30 s -> [B, n_mels, N] on the model's device, N the `padded_frames` of the longest.

    Clips [2, n], what each branch hears, give [B, 2 n_mels, N].
    """
    heard = [np.atleast_2d(clip) for clip in clips]
    length = padded_frames(model, max(clip.shape[1] for clip in heard) // HOP_LENGTH) * HOP_LENGTH
    shape = (len(heard), len(heard[0]), length)
    audio = torch.empty(shape, pin_memory=model.device.type == "cuda")  # which a GPU reads by itself
    for row, clip in zip(audio.numpy(), heard):
        row[:, : clip.shape[1]] = clip[:, :length]
        row[:, clip.shape[1] :] = 0
    return log_mel(model, audio.to(model.device, non_blocking=True))


def log_mel(model: Whisper, heard: Tensor, padding: int = 0) -> Tensor:
    """Samples [.., V, n] of V hearings of a recording -> [.., V n_mels, T], their spectrograms one below the other."""
    if heard.shape[-2] > 1 and not model.encoder.hears_twice:
        raise OptionError("two shares of a front end need a model whose branches hear apart: give one front_end_mix")
    mel = log_mel_spectrogram(heard.flatten(0, -2), model.dims.n_mels, padding)
    return mel.view(*heard.shape[:-2], -1, mel.shape[-1])


def last_windows(model: Whisper, clips: Sequence[np.ndarray]) -> Tensor:
    """As `mel_batch`, but each clip as the last window of a recording: zeros, not silence, follow its frames."""
    mel = mel_batch(model, clips)
    return mel.masked_fill_(frames_behind(mel, [clip.shape[-1] // HOP_LENGTH for clip in clips])[:, None], 0)


def encode_batch(model: Whisper, mel: Tensor) -> AudioFeatures:
    """Features [B, T, d] of windows [B, n_mels, 2T]."""
    with torch.no_grad():
        return model.encode(mel.to(model.device, model.dtype))


def decode_clips(
    model: Whisper, clips: Sequence[np.ndarray], options: DecodingOptions, hearing_of: Sequence[int] | None = None
) -> list[DecodingResult]:
    """Decode clips [n] of at most 30 s in one batch, as openai-whisper's `decode` does: once, as the options say.

    hearing_of: which clip each is a hearing of; the likeliest of each is given.
    """
    results = decode_windows(model, encode_batch(model, mel_batch(model, clips)), options)
    return list(likeliest(results, hearing_of or range(len(clips))).values())


def decode_with_fallback(
    model: Whisper,
    features: AudioFeatures,
    options: TranscribeOptions,
    prompt: list[int],
    hearing_of: Sequence[int] | None = None,
) -> list[DecodingResult]:
    """Decode windows [B, T, d] at each temperature in turn, those alone whose text is too repetitive or unlikely.

    hearing_of: which window each of the features is a hearing of; the likeliest of each is given, in order.
    """
    windows = hearing_of or range(len(features.primary))
    results: dict[int, DecodingResult] = {}
    failing = set(windows)
    for temperature in options.temperatures():
        rows = rows_of(failing, windows)
        decoded = decode_windows(model, pick(features, rows), options.at(temperature, prompt))
        results |= likeliest(decoded, [windows[row] for row in rows])
        failing = {window for window in failing if needs_fallback(model, results[window], options)}
        if not failing:
            break
    return [results[window] for window in sorted(results)]


def rows_of(windows: Collection[int], hearing_of: Sequence[int]) -> list[int]:
    """The rows that are hearings of these windows; hearing_of: which window each row is a hearing of."""
    return [row for row, window in enumerate(hearing_of) if window in windows]


def likeliest(results: Sequence[DecodingResult], hearing_of: Sequence[int]) -> dict[int, DecodingResult]:
    """Of the hearings of each window the result with the highest mean log probability."""
    best: dict[int, DecodingResult] = {}
    for window, result in zip(hearing_of, results):
        if window not in best or result.avg_logprob > best[window].avg_logprob:
            best[window] = result
    return best


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


def split_segments(
    result: DecodingResult, window: Window, model: Whisper, tokenizer: Tokenizer, logprobs: bool = False
) -> Split:
    """Cut a window's tokens at its pairs of timestamps; an unfinished segment at its end is left to the next window.

    logprobs: the segments have those of their tokens.
    """
    stride = N_FRAMES // model.dims.n_audio_ctx  # mel frames per timestamp: 2
    precision = stride * HOP_LENGTH / SAMPLE_RATE  # seconds per timestamp: 0.02
    tokens, begin = result.tokens, tokenizer.timestamp_begin
    is_time = [token >= begin for token in tokens]
    at_end = is_time[-2:] == [False, True]

    def segment(first: int, last: int, start: float, end: float) -> Segment:
        piece = tokens[first:last]
        text = tokenizer.decode([token for token in piece if token < tokenizer.eot])
        return Segment(
            id=0,
            seek=window.seek,
            start=start,
            end=end,
            text=text,
            tokens=piece,
            temperature=result.temperature,
            avg_logprob=result.avg_logprob,
            compression_ratio=result.compression_ratio,
            no_speech_prob=result.no_speech_prob,
            logprobs=result.logprobs[first:last] if logprobs else None,
        )

    cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not cuts:  # one segment, to its last timestamp or to the window's end
        times = [token for token in tokens if token >= begin]
        duration = (times[-1] - begin) * precision if times and times[-1] != begin else window.duration
        only = segment(0, len(tokens), window.start, window.start + duration)
        return Split([only], window.seek + window.size, at_end)
    if at_end:
        cuts.append(len(tokens))
    segments = [
        segment(
            i, j, window.start + (tokens[i] - begin) * precision, window.start + (tokens[j - 1] - begin) * precision
        )
        for i, j in zip([0, *cuts], cuts)
    ]
    resume = window.seek + (window.size if at_end else (tokens[cuts[-1] - 1] - begin) * stride)
    return Split(segments, resume, at_end)


def spoken(segments: Sequence[Segment], window: Window) -> list[Segment]:
    """The segments that say something and take time, none of it beyond the window's audio."""
    end = window.start + window.duration
    said = (segment for segment in segments if segment.start != segment.end and segment.text.strip())
    return [segment if segment.end <= end else ended(segment, end, window.start) for segment in said]


def ended(segment: Segment, end: float, start: float) -> Segment:
    """A segment whose times lie between `start` and `end`; it takes a little time even where all of it was later."""
    words = segment.words
    if words is not None:
        words = [replace(word, start=min(word.start, end), end=min(word.end, end)) for word in words]
    begin = min(segment.start, max(start, end - SHORTEST_SEGMENT)) if segment.start >= end else segment.start
    return replace(segment, start=begin, end=end, words=words)


# ---------------------------------------------------------------------------------------- word times in long form


def last_word_end(segments: list[Segment], default: float) -> float:
    """Where the last word ends, in seconds; without words, where the last segment does."""
    ends = [word.end for segment in segments for word in segment.words or []]
    return ends[-1] if ends else segments[-1].end if segments else default


def with_words(split: Split, timed: list[TimedText], window: Window, threshold: float | None) -> Split:
    """Give the segments their words, and resume after the last of them, unless `threshold` seconds or less are left."""
    segments = [replace(s, start=t.start, end=t.end, words=list(t.words)) for s, t in zip(split.segments, timed)]
    split = replace(split, segments=segments)
    spoken_until = last_word_end(segments, default=window.start)
    if not split.at_end and spoken_until > window.start:
        resume = round(spoken_until * FRAMES_PER_SECOND)
        if threshold is not None and window.end_of_30s - spoken_until <= threshold:
            resume = window.seek + window.size
        split = replace(split, resume=resume)
    return split


def timed_text(segment: Segment, eot: int) -> TimedText:
    """A segment's text tokens, those below <|endoftext|>, as what is to be timed."""
    places = [i for i, token in enumerate(segment.tokens) if token < eot]
    logprobs = None if segment.logprobs is None else [segment.logprobs[i] for i in places]
    return TimedText([segment.tokens[i] for i in places], segment.start, segment.end, logprobs=logprobs)


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
