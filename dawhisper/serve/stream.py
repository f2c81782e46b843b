"""Live audio in small pieces -> words as soon as they are stable, and final segments.

A buffer of the last seconds is decoded again each time a step of new audio has come. Words that are final are the
forced prefix of that decoding, and the text that has left the buffer is its prompt: so no word at a border is lost or
said twice. Which new words are final is decided by

- "attention": the cross-attention's path through the text (see timing.py) ends them `margin` seconds before the end of
  the audio (the last word: twice that), after AlignAtt (Papi et al., arXiv:2305.11408), or
- "agreement": two decodings in a row begin with them, LocalAgreement-2 (Liu et al., arXiv:2005.11185; in Whisper:
  Macháček et al., arXiv:2307.14743).

A doubtful decoding makes no word final. Of speakers whom the model hears badly all are doubtful, often to the end of
the turn; what two in a row begin with is shown nevertheless, as pending text.

Times are in seconds from the stream's beginning. Memory does not grow with the stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from whisper.audio import HOP_LENGTH, N_FRAMES, SAMPLE_RATE
from whisper.timing import merge_punctuations
from whisper.utils import compression_ratio

from dawhisper import vad
from dawhisper.audio import log_mel_spectrogram, pad_or_trim
from dawhisper.decoding import (
    DecodingOptions,
    DecodingResult,
    asked_language,
    decode_windows,
    encode_text,
    model_tokenizer,
)
from dawhisper.errors import OptionError
from dawhisper.model import AudioFeatures, Whisper
from dawhisper.options import option
from dawhisper.timing import SENTENCE_END, Timing, Word, find_alignment
from dawhisper.transcription import Segment, TranscribeOptions
from dawhisper.window import Window, encode_window, exceeds, is_silence, needs_fallback

CONTEXT = 64  # tokens of earlier text that prompt the decoder
SHORTEST = 0.5  # seconds of audio that are worth decoding
PIECE = 5.0  # seconds taken in at once, so that the buffer never outgrows the encoder's window
LONGEST_SEGMENT = 30.0
OPENING, FIRST_STEP = 3.0, 0.5  # seconds of a turn in which its first words are looked for, and how often
REPEATED = re.compile(r"(\b\w.{2,80}?)(?:\W*\1){3}", re.IGNORECASE | re.DOTALL)  # a phrase, four times in a row
TOKENS, TOKENS_PER_SECOND = 8, 12  # most that a decoding may say; Whisper's training had at most 7.5 a second


@dataclass(frozen=True)
class StreamOptions:
    """How to listen.

    language: code, tag or English name; None detects it until the first word is final. task: as of DecodingOptions.
    initial_prompt: text before the first word. policy, margin: see the module.
    step: seconds of new audio between two decodings. silence: seconds of pause that end a turn.
    longest: seconds of audio that are decoded again; what is before them is final. threshold: of the detector.
    """

    language: str | None = option(None, "language spoken, by code or English name; found out by default")
    task: str = option("transcribe", "translate means into English", choices=["transcribe", "translate"])
    initial_prompt: str | None = option(None, "text before the first word: names, spelling, style")
    policy: str = option("attention", "when a word is final", choices=["attention", "agreement"])
    step: float = option(1.0, "seconds of new audio between two decodings")
    margin: float = option(0.5, "of the policy attention: seconds that must follow a final word")
    silence: float = option(0.8, "seconds of pause that end a turn")
    longest: float = option(15.0, "seconds of audio that are decoded again")
    threshold: float = option(vad.THRESHOLD, "probability from which on sound counts as speech", name="vad_threshold")

    def __post_init__(self) -> None:
        if self.policy not in ("attention", "agreement"):
            raise OptionError(f"policy is attention or agreement, not {self.policy!r}")
        if self.task not in ("transcribe", "translate"):
            raise OptionError(f"task is transcribe or translate, not {self.task!r}")
        for name, low, high in (("step", 0.1, 5), ("margin", 0, 5), ("silence", 0.2, 5), ("longest", 5, 20)):
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} lies between {low} and {high} seconds, not {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise OptionError(f"vad_threshold lies between 0 and 1, not {self.threshold}")
        object.__setattr__(self, "language", asked_language(self.language))


@dataclass(frozen=True)
class LiveWord(Word):
    """A word with its tokens."""

    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Update:
    """What a piece of audio brought: words that are final now, the text after them that is not, closed segments.

    speech_start: where the speech of the turn starts, in seconds; None where nobody has spoken in it.
    """

    words: list[LiveWord] = field(default_factory=list)
    pending: str = ""
    segments: list[Segment] = field(default_factory=list)
    end_of_turn: bool = False
    speech_start: float | None = None

    def __add__(self, later: Update) -> Update:
        words, segments = self.words + later.words, self.segments + later.segments
        start = later.speech_start if self.speech_start is None else self.speech_start
        return Update(words, later.pending, segments, self.end_of_turn or later.end_of_turn, start)


@dataclass(frozen=True)
class LiveHypothesis:
    """The words decoded after the final ones, and the window's result.

    doubtful: the text repeats itself, is unlikely, stands for silence, or is longer than what can be said in its time;
    then there are no words. guess: the words of a text that is unlikely and no worse.
    """

    words: list[LiveWord]
    result: DecodingResult
    doubtful: bool
    guess: Sequence[str] = ()


class Stream:
    """One live recording. `feed` pieces of 16 kHz mono float samples, `finish` at the end."""

    def __init__(self, model: Whisper, options: StreamOptions | None = None):
        self.model, self.options = model, options or StreamOptions()
        self.language = "en" if not model.is_multilingual else self.options.language
        # text of a wrong hypothesis is final for ever, so an unlikely one waits for more audio instead
        self.thresholds = TranscribeOptions()
        self.buffer = np.zeros(0, np.float32)
        self.start = 0  # samples before the buffer
        self.fresh = 0  # samples at the buffer's end that were not decoded yet
        self.final: list[LiveWord] = []  # words spoken in the buffer
        self.context: list[int] = []  # tokens before the buffer
        if self.options.initial_prompt:
            tokenizer = model_tokenizer(model, self.language)
            self.context = encode_text(tokenizer, self.options.initial_prompt)[-CONTEXT:]
        self.previous: list[LiveWord] = []  # the last hypothesis
        self.guess: Sequence[str] = ()  # the last decoding's, where it was doubtful
        self.agreed: Sequence[str] = ()  # what two guesses in a row began with
        self.open: list[LiveWord] = []  # words of the segment that is not closed
        self.closed = 0  # segments
        self.turn: float | None = None  # where the speech of the open turn starts, in seconds

    @property
    def now(self) -> float:
        """Seconds heard."""
        return (self.start + len(self.buffer)) / SAMPLE_RATE

    @property
    def pending(self) -> str:
        """What is shown after the final words."""
        return text_of(self.previous) or "".join(self.agreed)

    def feed(self, samples: np.ndarray) -> Update:
        """Take in samples [n], of any number; decodes when a step of new audio has come."""
        update = Update(pending=self.pending)
        for first in range(0, len(samples), round(PIECE * SAMPLE_RATE)):
            piece = samples[first : first + round(PIECE * SAMPLE_RATE)]
            self.buffer = np.concatenate([self.buffer, piece.astype(np.float32)])
            self.fresh += len(piece)
            if self.wanted <= 0:
                update += self._listen()
        return update + Update(pending=update.pending, speech_start=self.turn)

    @property
    def wanted(self) -> int:
        """Samples to come before the next decoding: fewer before a turn's first words."""
        begun = self.final or self.previous or len(self.buffer) > OPENING * SAMPLE_RATE
        step = self.options.step if begun else min(self.options.step, FIRST_STEP)
        return round(step * SAMPLE_RATE) - self.fresh

    def finish(self) -> Update:
        """The rest of the words; the stream can be fed on afterwards."""
        if len(self.buffer) < SHORTEST * SAMPLE_RATE and not self.final:
            self._forget(len(self.buffer))
            return self._turn_ended(Update(segments=self._close()))
        return self._end_turn(self._decode(last=True))

    def _listen(self) -> Update:
        paused = not self._speaks(self.options.silence)
        if paused and not self.final and not self.previous and not self._speaks(self.options.longest + PIECE):
            self._forget(len(self.buffer) - round(SHORTEST * SAMPLE_RATE))  # a word's soft beginning may be in it
            self.fresh = 0
            return Update()
        if self.turn is None:
            frames = vad.detector()(self.buffer) >= self.options.threshold
            self.turn = self.start / SAMPLE_RATE + int(frames.argmax()) * vad.VAD_FRAME / SAMPLE_RATE
        hypothesis = self._decode(last=paused)
        if paused:
            return self._end_turn(hypothesis)
        # nobody is shown a doubtful text; the one before it stays until there is a better one
        update = Update() if hypothesis.doubtful else self._commit(hypothesis, self._stable(hypothesis))
        self.agreed = self.guess[: in_common(self.guess, hypothesis.guess)] or self.agreed
        self.guess = hypothesis.guess
        if len(self.buffer) > self.options.longest * SAMPLE_RATE:
            update += self._shorten()
        return replace(update, pending=self.pending)

    def _speaks(self, seconds: float) -> bool:
        """Whether somebody speaks in the last seconds (5 ms of work for 1 s, 30 ms for 15 s)."""
        n = round(seconds * SAMPLE_RATE)
        speech = vad.detector()(self.buffer[-(n + vad.CONTEXT) :])
        return bool((speech[-(n // vad.VAD_FRAME) :] >= self.options.threshold).any())

    def _decode(self, last: bool = False) -> LiveHypothesis:
        """Decode what follows the final words of the buffer; where it is the `last` time, as well as can be."""
        self.fresh = 0
        model, n = self.model, len(self.buffer)
        mel = log_mel_spectrogram(pad_or_trim(self.buffer, max(n, SAMPLE_RATE)), model.dims.n_mels, device=model.device)
        features = encode_window(model, mel[None], Window(0, min(N_FRAMES, mel.shape[-1])))
        prefix = [token for word in self.final for token in word.tokens]
        longest = min(self._most_tokens(), max(1, model.dims.n_text_ctx // 2 - len(prefix)))
        options = DecodingOptions(
            task=self.options.task,
            language=self.language,
            sample_len=longest,
            prompt=self.context,
            prefix=prefix,
            without_timestamps=True,
            suppress_blank=not prefix,  # that rule demands a word, but there may be no further one
        )
        result = decode_windows(model, features, options)[0]
        doubtful = self._is_doubtful(result, longest)
        if doubtful and last:
            result, doubtful = self._decode_otherwise(features, options, result, longest)
        if not doubtful:
            return LiveHypothesis(self._timed(prefix, result, features), result, doubtful)
        return LiveHypothesis([], result, doubtful, () if self._is_worthless(result, longest) else self._split(result))

    def _decode_otherwise(
        self, features: AudioFeatures, options: DecodingOptions, result: DecodingResult, longest: int
    ) -> tuple[DecodingResult, bool]:
        """Where nothing more will be heard: higher temperatures, as offline, and at last the likeliest of these texts.

        None that loops, and nothing where nobody speaks. A phrase four times in a row may have been said: such a text
        is given only where there is no other.
        """
        tried = [result]
        for temperature in self.thresholds.temperatures()[1:]:
            if self._is_silence(tried[-1]):
                return tried[-1], True
            tried += decode_windows(self.model, features, replace(options, temperature=temperature))
            if not self._is_doubtful(tried[-1], longest) and not REPEATED.search(tried[-1].text):
                return tried[-1], False
        usable = [r for r in tried if not self._is_worthless(r, longest)]
        usable = [r for r in usable if not REPEATED.search(r.text)] or usable
        return (max(usable, key=lambda r: r.avg_logprob), False) if usable else (result, True)

    def _split(self, result: DecodingResult) -> list[str]:
        """The text's words."""
        tokenizer = model_tokenizer(self.model, result.language, self.options.task)
        return tokenizer.split_to_word_tokens([token for token in result.tokens if token < tokenizer.eot])[0]

    def _most_tokens(self) -> int:
        """How many tokens can have been said after the final words: without an end a loop takes seconds."""
        said = self.final[-1].end if self.final else self.start / SAMPLE_RATE
        return TOKENS + round(TOKENS_PER_SECOND * max(0.0, self.now - said))

    def _timed(self, prefix: list[int], result: DecodingResult, features: AudioFeatures) -> list[LiveWord]:
        """The words after the prefix with their times, gates and tokens."""
        tokenizer = model_tokenizer(self.model, result.language, self.options.task)
        text = [(token, p) for token, p in zip(result.tokens, result.logprobs) if token < tokenizer.eot]
        tokens, logprobs = prefix + [token for token, _ in text], [p for _, p in text]
        frames = min(N_FRAMES, len(self.buffer) // HOP_LENGTH)
        new: list[Timing] = []
        taken = 0
        for timing in find_alignment(self.model, tokenizer, tokens, features, frames):
            old = len(prefix) - taken  # tokens that are final already
            taken += len(timing.tokens)
            if old > 0:
                timing.tokens = timing.tokens[old:]
                timing.word = tokenizer.decode(timing.tokens)
            if timing.tokens:
                new.append(timing)
        merge_punctuations(new, self.thresholds.prepend_punctuations, self.thresholds.append_punctuations)
        origin, words = self.start / SAMPLE_RATE, []
        for timing in new:
            if not timing.tokens:
                continue
            start, end = (min(round(origin + t, 2), self.now) for t in (timing.start, timing.end))
            n, of = len(timing.tokens), (timing.word, start, end, timing.probability, timing.gate)
            words.append(LiveWord(*of, logprobs=logprobs[:n], tokens=tuple(timing.tokens)))
            logprobs = logprobs[n:]
        return words

    def _stable(self, hypothesis: LiveHypothesis) -> int:
        """How many of the hypothesis' words are final."""
        words, before = hypothesis.words, self.previous
        if self.options.policy == "attention":
            until = self.now - self.options.margin
            n = next((i for i, word in enumerate(words) if word.end > until), len(words))
            # the last word may be a part of a longer one: more must be heard after it
            return n - 1 if words and n == len(words) and words[-1].end > until - self.options.margin else n
        return in_common([word.word for word in words], [word.word for word in before])

    def _is_doubtful(self, result: DecodingResult, longest: int) -> bool:
        """Whether the text repeats itself or the final words, is unlikely, or stands for silence."""
        return needs_fallback(self.model, result, self.thresholds) or self._is_worthless(result, longest)

    def _is_worthless(self, result: DecodingResult, longest: int) -> bool:
        """Whether the text is a loop or stands for silence, so that nothing of it is of use."""
        return self._loops(result, longest) or self._is_silence(result)

    def _loops(self, result: DecodingResult, longest: int) -> bool:
        """Whether the text repeats itself or the final words, or has not ended after as much as can be said."""
        repeats = max(result.compression_ratio, compression_ratio(text_of(self.final) + result.text))
        return len(result.tokens) >= longest or exceeds(repeats, self.thresholds.compression_ratio_threshold)

    def _is_silence(self, result: DecodingResult) -> bool:
        return not self.final and is_silence(self.model, result, self.thresholds)

    def _commit(self, hypothesis: LiveHypothesis, n: int) -> Update:
        """Make the first n words final."""
        words = hypothesis.words[:n]
        self.previous, self.guess, self.agreed = hypothesis.words[n:], (), ()
        self.final += words
        if words and self.language is None:
            self.language = hypothesis.result.language
        segments: list[Segment] = []
        for word in words:
            self.open.append(word)
            if word.word.rstrip("\"'”)")[-1:] in tuple(SENTENCE_END) or word.end - self.open[0].start > LONGEST_SEGMENT:
                segments += self._close(hypothesis.result)
        return Update(words, segments=segments)

    def _end_turn(self, hypothesis: LiveHypothesis) -> Update:
        update = self._commit(hypothesis, len(hypothesis.words))
        self._remember(self.final)
        self.final, self.previous = [], []
        self._forget(len(self.buffer))
        return self._turn_ended(update + Update(segments=self._close(hypothesis.result)))

    def _turn_ended(self, update: Update) -> Update:
        start, self.turn = self.turn, None
        return replace(update, end_of_turn=True, speech_start=start)

    def _close(self, result: DecodingResult | None = None) -> list[Segment]:
        """The open words as a segment; its probabilities are those of the last decoding."""
        words, self.open = self.open, []
        if not words:
            return []
        self.closed += 1
        nan = float("nan")
        return [
            Segment(
                id=self.closed - 1,
                seek=round(words[0].start * SAMPLE_RATE / HOP_LENGTH),
                start=words[0].start,
                end=words[-1].end,
                text=text_of(words),
                tokens=[token for word in words for token in word.tokens],
                logprobs=[logprob for word in words for logprob in word.logprobs or []],
                temperature=0.0,
                avg_logprob=result.avg_logprob if result else nan,
                compression_ratio=result.compression_ratio if result else nan,
                no_speech_prob=result.no_speech_prob if result else nan,
                words=list(words),
            )
        ]

    def _shorten(self) -> Update:
        """Let go of the audio before the latest sentence within the final words, or before their longest pause."""
        after = range(len(self.final) - 1)
        ends = [i for i in after if self.final[i].word[-1:] in tuple(SENTENCE_END)]
        if not len(after):
            return self._give_up()
        last = ends[-1] if ends else max(after, key=lambda i: self.final[i + 1].start - self.final[i].end)
        if not ends and len(self.buffer) > 1.2 * self.options.longest * SAMPLE_RATE:
            last = max(last, (len(self.final) - 1) // 2)
        before, behind = self.final[last], self.final[last + 1]
        self._remember(self.final[: last + 1])
        self.final = self.final[last + 1 :]
        # word times are a little off: the quietest moment around the border belongs to neither word
        first, end = (round((w.start + w.end) / 2 * SAMPLE_RATE) - self.start for w in (before, behind))
        frames = (end - first) // vad.VAD_FRAME
        if frames > 0:
            levels = vad.loudness(self.buffer[first : first + frames * vad.VAD_FRAME])
            end = first + vad.VAD_FRAME * int(levels.argmin()) + vad.VAD_FRAME // 2
        self._forget(end)
        return Update()

    def _give_up(self) -> Update:
        """No word of a long buffer is final: nobody speaks, or the text can't be trusted. Keep its second half."""
        if len(self.buffer) <= (self.options.longest + PIECE) * SAMPLE_RATE:
            return Update()
        self._remember(self.final)
        self.final, self.previous, self.guess, self.agreed = [], [], (), ()
        self._forget(len(self.buffer) // 2)
        return Update()

    def _remember(self, words: list[LiveWord]) -> None:
        said = [token for word in words for token in word.tokens]
        self.context = (self.context + said)[-CONTEXT:]

    def _forget(self, samples: int) -> None:
        """Drop the buffer's first samples."""
        samples = max(0, samples)
        self.start += samples
        self.buffer = self.buffer[samples:].copy()


@torch.no_grad()
def warm_up(model: Whisper) -> None:
    """Do once what is slow the first time (compiled functions, the detector), so that no speaker waits for it."""
    heard = Stream(model, StreamOptions(language="en"))
    heard.feed(np.zeros(SAMPLE_RATE, np.float32))
    mel = log_mel_spectrogram(np.zeros(SAMPLE_RATE, np.float32), model.dims.n_mels, device=model.device)
    features = encode_window(model, mel[None], Window(0, mel.shape[-1]))
    tokenizer = model_tokenizer(model, "en")
    decode_windows(model, features, DecodingOptions(language="en", sample_len=TOKENS))
    find_alignment(model, tokenizer, tokenizer.encode(" One, two."), features, mel.shape[-1])


def in_common(words: Sequence[str], others: Sequence[str]) -> int:
    """How many words both begin with."""
    same = [a == b for a, b in zip(words, others)]
    return same.index(False) if False in same else len(same)


def text_of(words: list[LiveWord]) -> str:
    return "".join(word.word for word in words)


def as_dict(update: Update) -> dict[str, Any]:
    """For JSON: words with their times, and segments without their tokens."""

    def word(w: Word) -> dict[str, Any]:
        return {k: v for k, v in asdict(w).items() if k not in ("tokens", "logprobs") and v is not None}

    return {
        "words": [word(w) for w in update.words],
        "pending": update.pending,
        "segments": [
            {"id": s.id, "start": s.start, "end": s.end, "text": s.text, "words": [word(w) for w in s.words or []]}
            for s in update.segments
        ],
        "end_of_turn": update.end_of_turn,
    }
