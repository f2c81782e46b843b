"""Text -> what the decoder should say: Whisper's token sequences, and the spelling of the text in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import numpy as np
from whisper.tokenizer import LANGUAGES

from dawhisper.audio import N_SAMPLES_PER_TOKEN, TOKENS_PER_SECOND
from dawhisper.decoding import language_code
from dawhisper.errors import DataError, OptionError

from .manifest import Utterance

IGNORE = -100  # a label without loss
NO_SPACE_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})  # written without spaces between words
TEXT_STYLES = ("keep", "lower", "teacher")


@dataclass(frozen=True)
class TargetOptions:
    """How text becomes decoder targets; the first three are the model's.

    text_style: "keep"; "lower"; "teacher": the spelling (case, punctuation) of teacher_text where it agrees with the
        text after Whisper's normalisation, otherwise the text, lower-cased if it is all upper case.
    labels: "text" takes teacher_text only where there is no usable text; "teacher" always takes teacher_text.
    timestamps: share of the targets with time stamps. prompt: share that has the previous text as a prompt.
    language: for utterances that don't say theirs. task: "transcribe" or "translate".
    require_text: leave out what would have no target; otherwise it is kept, without labels.
    max_tokens: leave out longer texts (a step's memory goes with its longest text; decoding writes 224 at most).
    """

    multilingual: bool = True
    num_languages: int = 99
    n_text_ctx: int = 448
    text_style: str = "keep"
    labels: str = "text"
    timestamps: float = 0.5
    prompt: float = 0.2
    language: str | None = None
    task: str = "transcribe"
    require_text: bool = False
    max_tokens: int = 448

    def __post_init__(self) -> None:
        for name, known in (
            ("text_style", TEXT_STYLES),
            ("labels", ("text", "teacher")),
            ("task", ("transcribe", "translate")),
        ):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("timestamps", "prompt"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is a share between 0 and 1, not {getattr(self, name)}")
        if self.language is not None and whisper_language(self.language, self.num_languages) is None:
            raise OptionError(f"Whisper does not know the language {self.language!r}")


@dataclass(frozen=True)
class Target:
    """One utterance's decoder input and labels (lists of the same length), and the places of its prefix."""

    tokens: list[int]
    labels: list[int]
    sot: int  # index of <|startoftranscript|> in tokens
    begin: int  # index of the last token before the text: <|notimestamps|> or <|0.00|>
    has_text: bool


def whisper_language(code: str | None, num_languages: int = 99) -> str | None:
    """Whisper's code for a language tag or English name ("zh-CN", "Azerbaijani"); None where Whisper has none."""
    known = list(LANGUAGES)[:num_languages]
    if (code or "").strip().lower().replace("_", "-") == "zh-hk" and "yue" in known:
        return "yue"
    try:
        found = language_code(code or "")
    except OptionError:
        return None
    return found if found in known else None


class Targets:
    """Makes targets as Whisper was trained: prompt, language and task tokens, text with or without time stamps."""

    def __init__(self, options: TargetOptions):
        self.options = options
        self.tokenizer = _tokenizer(options.multilingual, options.num_languages, "en", options.task)

    def choose(self, u: Utterance) -> tuple[str, str, bool] | None:
        """(text, Whisper's language, does it come from a transcript); None when there is nothing to learn from."""
        o = self.options
        language = self._language(u.language) or (self._language(o.language) if u.language is None else None)
        if o.labels == "text" and u.text and u.text.strip() and language:
            return styled_text(u, o.text_style, language), language, True
        heard = self._language(u.teacher_language) or language
        if u.teacher_text and u.teacher_text.strip() and heard:
            return u.teacher_text.strip(), heard, False
        return None

    def __call__(
        self, u: Utterance, n_samples: int, rng: np.random.Generator, previous: Utterance | None = None
    ) -> Target:
        """The target of a clip of n_samples. Raises DataError when the text is too long for the decoder."""
        o, tokenizer = self.options, self.tokenizer
        draw_time, draw_prompt = rng.random(2)  # both are always drawn: one option does not change the other's draws
        stamped = bool(draw_time < o.timestamps)
        chosen = self.choose(u)
        language = chosen[1] if chosen else (self._language(u.language) or self._language(o.language) or "en")
        prefix = list(_tokenizer(o.multilingual, o.num_languages, language, o.task).sot_sequence)
        prefix.append(tokenizer.timestamp_begin if stamped else tokenizer.no_timestamps)
        if chosen is None:
            return Target(prefix, [IGNORE] * len(prefix), 0, len(prefix) - 1, False)
        plain = self.encode(chosen[0], language)
        with_stamps = self._with_stamps(u, plain, language, n_samples)
        n = len(with_stamps)  # drawn or not: what fits once must fit at every draw
        if n > o.max_tokens or len(prefix) + n > o.n_text_ctx + 1:
            raise DataError(f"text too long: {n} tokens, more than {min(o.n_text_ctx, o.max_tokens)}")
        if stamped:
            prefix[-1], *plain = with_stamps
        body = [*plain, tokenizer.eot]
        room = o.n_text_ctx + 1 - len(prefix) - len(body)
        prompt: list[int] = []
        before = self.choose(previous) if previous is not None and draw_prompt < o.prompt else None
        if before is not None and room > 1:
            prompt = self.encode(before[0], before[1])[-min(room - 1, o.n_text_ctx // 2 - 1) :]
            prompt.insert(0, tokenizer.sot_prev)
        full = prompt + prefix + body
        labels = [IGNORE] * len(prompt) + full[len(prompt) + 1 :]
        return Target(full[:-1], labels, len(prompt), len(prompt) + len(prefix) - 1, chosen[2])

    def _with_stamps(self, u: Utterance, plain: list[int], language: str, n_samples: int) -> list[int]:
        """Each segment between its time stamps; without segments, or where one has no text, the whole between two."""
        spoken = [(0.0, n_samples / N_SAMPLES_PER_TOKEN, plain)]  # from and to which encoder position
        segments = u.segments or ()
        texts = [self.choose(replace(u, text=s.text, teacher_text=s.teacher_text, segments=None)) for s in segments]
        if texts and all(texts):
            parts = [self.encode(chosen[0], language) for chosen in texts if chosen]
            places = [(TOKENS_PER_SECOND * s.start, TOKENS_PER_SECOND * s.end) for s in segments]
            spoken = [(start, end, part) for (start, end), part in zip(places, parts)]
        tokens = []
        zero = self.tokenizer.timestamp_begin
        for start, end, part in spoken:
            tokens += [zero + round(start), *part, zero + round(end)]
        return tokens

    def encode(self, text: str, language: str) -> list[int]:
        """Text -> token ids, with the leading space that Whisper's texts have."""
        space = "" if language in NO_SPACE_LANGUAGES else " "
        # "<|...|>" in a text is text
        return self.tokenizer.encode(space + text.strip(), disallowed_special=())

    def _language(self, code: str | None) -> str | None:
        known = whisper_language(code, self.options.num_languages)
        if self.options.multilingual:
            return known
        return "en" if known == "en" or code is None else None  # an English-only model can't write the others


@lru_cache(maxsize=256)
def _tokenizer(multilingual: bool, num_languages: int, language: str, task: str) -> Any:
    from whisper.tokenizer import get_tokenizer

    if not multilingual:
        return get_tokenizer(False)
    return get_tokenizer(True, num_languages=num_languages, language=language, task=task)


@lru_cache(maxsize=1 << 17)  # an epoch's texts: comparing with the teacher's costs a millisecond each
def styled_text(u: Utterance, style: str, language: str) -> str:
    """The utterance's text in one of TEXT_STYLES."""
    text = (u.text or "").strip()
    if style == "keep":
        return text
    plain = lower(text, language) if style == "lower" or text == text.upper() else text
    if style == "lower" or not u.teacher_text:
        return plain
    normalise = _normaliser(language == "en")
    if normalise(text) == normalise(u.teacher_text):
        return u.teacher_text.strip()
    return _merge_spelling(plain.split(), u.teacher_text.split(), language == "en")


def lower(text: str, language: str) -> str:
    """Lower case; Turkish and Azerbaijani tell the dotted from the dotless i."""
    if language in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    return text.lower()


def _merge_spelling(words: list[str], teacher: list[str], english: bool) -> str:
    """The words, each spelt as the teacher does where the two agree after normalisation."""
    keys = [[_normal_word(w, english) for w in side] for side in (words, teacher)]
    out = list(words)
    for i, j, n in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks():
        out[i : i + n] = teacher[j : j + n]
    return " ".join(out)


@lru_cache(maxsize=2)
def _normaliser(english: bool) -> Any:
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer() if english else BasicTextNormalizer()


@lru_cache(maxsize=50_000)
def _normal_word(word: str, english: bool) -> str:
    return _normaliser(english)(word).strip()
