"""One batch of 30-second windows -> tokens: language detection, rules, and what was decoded.

Shapes: B windows, R rows (beams or samples of each window), V vocabulary, L token positions. Options, results and rules
are openai-whisper's; everything here runs for the whole batch at once, on the model's device, and the host looks at one
flag: whether all rows are done. The search itself is in search.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from whisper.audio import CHUNK_LENGTH
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE, Tokenizer, get_tokenizer
from whisper.utils import compression_ratio

from dawhisper.fast.cache import open_cache

from . import ranking
from .errors import OptionError, near_names
from .hotwords import Hotwords, prefix_tree, terms_of
from .kv_cache import KVCache
from .model import AudioFeatures, Whisper
from .options import option
from .ranking import Alternative, Candidate, by_risk, n_best, ranked_candidates
from .search import NEVER, BeamSearch, Candidates, Sampling, Search

OTHER_CODES = {  # older, wider or narrower codes of languages -> Whisper's
    "cmn": "zh",
    "fil": "tl",
    "in": "id",
    "iw": "he",
    "ji": "yi",
    "jv": "jw",
    "mo": "ro",
    "nb": "no",
    "zsm": "ms",
}
HOTWORD_STRENGTH = 2.0
LOOK_EVERY = 8  # tokens between looks at the flag on a GPU, which stands still meanwhile


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode a window; the fields are openai-whisper's.

    task: "transcribe", "translate" (to English) or "lang_id" (detect the language only).
    language: code, tag or English name; None or "auto" detects it for each window.
    temperature: 0 decodes greedily or with beams, above 0 samples.
    sample_len: most tokens to sample; None is half of the text context.
    best_of: samples drawn a window at a temperature above 0; the best is kept.
    beam_size, patience: beam search at temperature 0; patience as in Kasai et al., arXiv:2204.05424.
    length_penalty: alpha of Wu et al., arXiv:1609.08144; None divides by the length.
    hotwords: terms to favour, a list or a string with commas, spelled as they are to be written; hotword_strength:
        what each of their tokens gains in log probability (hotwords.py).
    rerank: "mbr" takes, at temperature 0, the text of least expected edit distance to a few samples (ranking.py).
    n_best: how many different texts of a window are given, best first, out of its beams or samples.
    prompt: earlier text, or its tokens; prefix: the beginning of this window's text, or its tokens.
    suppress_tokens: ids never sampled, "-1" adds the non-speech symbols; suppress_blank: no empty start;
        a model trained on noise alone (`knows_silence`) may still end at once where that is likelier than all else.
    without_timestamps: text only; max_initial_timestamp: latest start of the first segment, in seconds.
    fp16: accepted for openai-whisper's callers and ignored; the model's own dtype is used.
    """

    task: str = option("transcribe", "translate means into English", choices=["transcribe", "translate"])
    language: str | None = option(None, "language spoken, by code or English name; None detects it")
    temperature: float = 0.0
    sample_len: int | None = None
    best_of: int | None = option(None, "samples at a temperature above 0; the best is kept")
    beam_size: int | None = option(None, "beams at temperature 0; None decodes greedily")
    patience: float | None = option(None, "beam search patience (arXiv:2204.05424); 1.0 is plain beam search")
    length_penalty: float | None = option(None, "alpha of arXiv:1609.08144; None divides by the length")
    hotwords: str | Sequence[str] | None = option(None, "names and terms to listen for, with commas; or a file of them")
    hotword_strength: float = option(HOTWORD_STRENGTH, "what each token of a hotword gains in log probability")
    rerank: str | None = option(
        None, "mbr: of beams and samples the text nearest to all samples; takes longer", choices=["mbr"]
    )
    n_best: int | None = option(None, "also give the N best texts of each window, out of its beams or samples (json)")
    prompt: str | list[int] | None = None
    prefix: str | list[int] | None = None
    suppress_tokens: str | Iterable[int] | None = option(
        "-1", "ids never sampled, comma-separated; -1 is most special characters"
    )
    suppress_blank: bool = True
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0
    fp16: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "language", asked_language(self.language))

    def verify(self) -> None:
        """OptionError for values out of range and for options that exclude each other."""
        if self.task not in ("transcribe", "translate", "lang_id"):
            raise OptionError(f"unknown task {self.task!r}; use transcribe, translate or lang_id")
        if self.beam_size is not None and self.best_of is not None:
            raise OptionError("beam_size and best_of can't be given together; beam_size is for temperature 0")
        if self.temperature == 0 and self.best_of is not None:
            raise OptionError("best_of needs a temperature above 0; use beam_size at temperature 0")
        if not 0 <= self.temperature < math.inf:
            raise OptionError(f"temperature is 0 or more, not {self.temperature}")
        if self.patience is not None and self.beam_size is None:
            raise OptionError("patience needs beam_size")
        for name in ("beam_size", "best_of", "sample_len", "n_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is at least 1, not {value}")
        if self.rerank not in (None, "mbr"):
            raise OptionError(f"rerank is mbr or None, not {self.rerank!r}")
        if not 0 <= self.hotword_strength < math.inf:
            raise OptionError(f"hotword_strength is 0 or more, not {self.hotword_strength}")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise OptionError(f"length_penalty lies between 0 and 1, not {self.length_penalty}")
        if self.patience is not None and round(cast(int, self.beam_size) * self.patience) < 1:
            raise OptionError(f"patience {self.patience} leaves no candidate; use 1.0 or more")


@dataclass(frozen=True)
class DecodingResult:
    """What was decoded in one window; log probabilities are natural.

    logprobs: of each of the tokens, after the rules; avg_logprob: their mean, <|endoftext|>'s included.
    alternatives: the best texts, this one first, as many as `n_best` asks for and as differ.
    """

    audio_features: AudioFeatures  # [T, d] each
    language: str
    language_probs: dict[str, float] | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    avg_logprob: float = float("nan")
    no_speech_prob: float = float("nan")
    temperature: float = float("nan")
    compression_ratio: float = float("nan")
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)


def language_code(language: str) -> str:
    """The code of a language given by code, tag (en-US, zh_TW) or English name; OptionError with a hint otherwise."""
    name = language.strip().lower().replace("_", "-")
    for known in (name, name.split("-")[0]):
        known = OTHER_CODES.get(known, known)
        if known in LANGUAGES:
            return known
        if known in TO_LANGUAGE_CODE:
            return TO_LANGUAGE_CODE[known]
    start = name.split("-")[0]  # eng, spa: three letters are often the name's first
    alike = [code for code, english in LANGUAGES.items() if len(start) == 3 and english.startswith(start)]
    hint = f"; did you mean {', '.join(alike)}?" if alike else near_names(name, [*LANGUAGES, *TO_LANGUAGE_CODE])
    raise OptionError(
        f"unknown language {language!r}{hint or '; use a code such as en or zh, an English name, or auto'}"
    )


def asked_language(language: str | None) -> str | None:
    """The code of the language that was asked for; None for "auto" and for nothing, which have it found out."""
    if not isinstance(language, (str, type(None))):
        raise OptionError(f"language is a code or an English name, not {language!r}")
    return language_code(language) if language and language.strip().lower() != "auto" else None


def model_tokenizer(model: Whisper, language: str | None = None, task: str | None = None) -> Tokenizer:
    """openai-whisper's tokenizer for this model; the language is ignored by English-only models."""
    code = language_code(language) if language else None
    if model.is_multilingual and code and list(LANGUAGES).index(code) >= model.num_languages:
        raise OptionError(f"this model does not know {LANGUAGES[code]}; use a newer one, such as large-v3")
    task = None if task == "lang_id" else task
    return get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=code, task=task)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's tokens, after the space that Whisper's texts begin with; "<|...|>" in it is text."""
    return tokenizer.encode(" " + text.strip(), disallowed_special=())


# ---------------------------------------------------------------------------------------------------------- rules


class Rules:
    """Which tokens may come next, for all rows at once (OpenAI's suppression and timestamp rules)."""

    def __init__(self, model: Whisper, tokenizer: Tokenizer, options: DecodingOptions):
        # a model trained on noise alone means it when it would rather end at once than say anything at all
        self.believes_silence = options.suppress_blank and model.knows_silence
        blank = tokenizer.encode(" ") if options.suppress_blank else []
        if options.suppress_blank and not self.believes_silence:
            blank = [*blank, tokenizer.eot]
        self.blank = torch.tensor(blank, dtype=torch.long, device=model.device)
        never = suppressed_tokens(tokenizer, options.suppress_tokens)
        self.timestamps = not options.without_timestamps
        if self.timestamps:
            never.append(tokenizer.no_timestamps)
        if never and not 0 <= min(never) <= max(never) < model.dims.n_vocab:
            raise OptionError(
                f"suppress_tokens are -1 and ids below {model.dims.n_vocab}, not {options.suppress_tokens}"
            )
        self.never = torch.tensor(sorted(set(never)), dtype=torch.long, device=model.device)
        self.eot, self.begin = tokenizer.eot, tokenizer.timestamp_begin
        self.ids = torch.arange(self.begin, model.dims.n_vocab, device=model.device)
        self.latest_start: int | None = None  # the last timestamp token allowed as the first one
        if options.max_initial_timestamp:
            precision = CHUNK_LENGTH / model.dims.n_audio_ctx
            self.latest_start = self.begin + round(options.max_initial_timestamp / precision)

    def apply(self, logits: Tensor, sampled: Tensor) -> None:
        """Set the logits [R, V] of forbidden tokens to -inf, given those sampled so far [R, L]."""
        if sampled.shape[1] == 0:
            if self.believes_silence:
                ends = logits[:, self.eot]
                ends.masked_fill_(ends <= logits.logsumexp(dim=1) - math.log(2), NEVER)  # unlikelier than all else
            logits.index_fill_(1, self.blank, NEVER)
        logits.index_fill_(1, self.never, NEVER)
        if self.timestamps:
            self._timestamps(logits, sampled)

    def _timestamps(self, logits: Tensor, sampled: Tensor) -> None:
        text, times = logits[:, : self.begin], logits[:, self.begin :]
        n = sampled.shape[1]
        if n == 0:  # the window starts with a timestamp, not too late
            text.fill_(NEVER)
            if self.latest_start is not None:
                logits[:, self.latest_start + 1 :] = NEVER
            return
        after_time = sampled[:, -1:] >= self.begin
        closed = sampled[:, -2:-1] >= self.begin if n > 1 else torch.ones_like(after_time)
        # timestamps come in pairs, except before the end of text
        times.masked_fill_(after_time & closed, NEVER)
        logits[:, : self.eot].masked_fill_(after_time & ~closed, NEVER)
        # they don't decrease, and a segment is not empty
        last = sampled.amax(dim=1, keepdim=True)
        times.masked_fill_(self.ids < last + 1 - (after_time & ~closed).long(), NEVER)
        # a timestamp, if all timestamps together are likelier than any one text token
        text.masked_fill_((times.logsumexp(dim=1) > text.amax(dim=1))[:, None], NEVER)


def suppressed_tokens(tokenizer: Tokenizer, suppress: str | Iterable[int] | None) -> list[int]:
    """The ids behind `suppress_tokens`, with the special ones that are never text."""
    if isinstance(suppress, str):
        try:
            suppress = [int(token) for token in suppress.split(",") if token.strip()]
        except ValueError:
            raise OptionError(f"suppress_tokens is a comma-separated list of ids, not {suppress!r}") from None
    ids = list(suppress or [])
    if not ids:
        return []
    if -1 in ids:
        ids = [token for token in ids if token >= 0] + list(tokenizer.non_speech_tokens)
    ids += [tokenizer.transcribe, tokenizer.translate, tokenizer.sot, tokenizer.sot_prev, tokenizer.sot_lm]
    return ids + ([] if tokenizer.no_speech is None else [tokenizer.no_speech])


# --------------------------------------------------------------------------------------------------------- decode


def initial_tokens(model: Whisper, tokenizer: Tokenizer, options: DecodingOptions) -> list[int]:
    """[<|startofprev|> prompt] <|startoftranscript|> [language, task] [<|notimestamps|>] [prefix]"""

    def encoded(text: str | list[int]) -> list[int]:
        return encode_text(tokenizer, text) if isinstance(text, str) else list(text)

    half = model.dims.n_text_ctx // 2
    tokens = list(
        tokenizer.sot_sequence_including_notimestamps if options.without_timestamps else tokenizer.sot_sequence
    )
    if options.prefix:
        # the prefix and what is sampled share half of the text context
        room = half - options.sample_len if options.sample_len else 0
        tokens += encoded(options.prefix)[-room:]
    if options.prompt:
        tokens = [tokenizer.sot_prev, *encoded(options.prompt)[-(half - 1) :], *tokens]
    return tokens


def windows_features(model: Whisper, audio: Tensor | AudioFeatures) -> tuple[AudioFeatures, bool]:
    """Encode a mel [.., n_mels, frames]; features are taken as they are. Also: was it a single window?"""
    if isinstance(audio, AudioFeatures):
        single = audio.primary.ndim == 2
        return (AudioFeatures(*(x[None] for x in audio)) if single else audio), single
    single = audio.ndim == 2
    audio = (audio[None] if single else audio).to(model.device, model.dtype)
    if audio.ndim != 3:
        raise OptionError(f"a mel spectrogram has 2 or 3 dimensions, not {list(audio.shape)}")
    if audio.shape[1:] == (model.dims.n_audio_ctx, model.dims.n_audio_state):  # encoded already
        if model.dual is not None and model.dual.own_memory:
            raise OptionError("this model's decoder reads two memories; pass the AudioFeatures of model.encode(mel)")
        return AudioFeatures(audio, audio), single
    most = 2 if model.encoder.hears_twice else 1
    if audio.shape[1] not in (model.dims.n_mels, most * model.dims.n_mels):
        raise OptionError(f"the model takes {model.dims.n_mels} mel channels, not {audio.shape[1]}")
    if audio.shape[2] != 2 * model.dims.n_audio_ctx and not model.variable_audio_ctx:
        raise OptionError(
            f"the model takes {2 * model.dims.n_audio_ctx} frames (30 s; see pad_or_trim), not {audio.shape[2]}"
        )
    return model.encode(audio), single


def _detect(model: Whisper, cache: KVCache, tokenizer: Tokenizer) -> tuple[Tensor, list[dict[str, float]]]:
    """Language tokens [B] and probabilities of the windows in a fresh cache, which is fresh again afterwards."""
    sot = torch.full((cache.rows, 1), tokenizer.sot, device=model.device)
    logits = cache.first_logits(model.decoder, sot, [0])[:, 0]
    cache.length = 0
    ids = torch.tensor(tokenizer.all_language_tokens, device=logits.device)
    probs = logits[:, ids].softmax(dim=-1)
    return ids[probs.argmax(dim=-1)], [dict(zip(tokenizer.all_language_codes, row)) for row in probs.tolist()]


@torch.no_grad()
def detect_language(
    model: Whisper, mel: Tensor | AudioFeatures, tokenizer: Tokenizer | None = None
) -> tuple[Tensor, dict[str, float] | list[dict[str, float]]]:
    """The language spoken in each window: mel [n_mels, 3000] or [B, n_mels, 3000], or features.

    Returns the language tokens [B] and, for each window, a dict from language code to probability (for a single
    window the token [] and its dict). OptionError for English-only models, which have no language tokens.
    """
    if not model.is_multilingual:
        raise OptionError("this model knows English only and can't detect languages; use a multilingual one")
    features, single = windows_features(model, mel)
    cache = KVCache(model.decoder, features, max_length=1)
    tokens, probs = _detect(model, cache, tokenizer or model_tokenizer(model))
    return (tokens[0], probs[0]) if single else (tokens, probs)


@torch.no_grad()
def decode(
    model: Whisper, mel: Tensor | AudioFeatures, options: DecodingOptions | None = None, **kwargs: Any
) -> DecodingResult | list[DecodingResult]:
    """Decode windows of audio: mel [n_mels, 3000] or [B, n_mels, 3000], or the AudioFeatures of model.encode(mel).

    Returns a DecodingResult, or a list of B of them. Keyword arguments override the options' fields. OptionError
    where an option or the audio's shape can't be used.
    """
    features, single = windows_features(model, mel)
    results = decode_windows(model, features, replace(options or DecodingOptions(), **kwargs))
    return results[0] if single else results


@torch.no_grad()
def decode_windows(model: Whisper, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
    """Decode encoded windows [B, T, d]; they share the options, and each may have its own detected language."""
    options.verify()
    tokenizer = model_tokenizer(model, options.language or "en", options.task)
    first = initial_tokens(model, tokenizer, options)
    n_ctx = model.dims.n_text_ctx
    if len(first) > n_ctx:
        raise OptionError(f"prompt and prefix make {len(first)} tokens; the model's text context has {n_ctx}")
    max_length = min(len(first) + (options.sample_len or n_ctx // 2), n_ctx + 1)
    group = options.beam_size or options.best_of or 1
    with open_cache(model.decoder, features, group, max_length - 1) as cache:
        return _decode_cached(model, cache, features, first, max_length, tokenizer, options)


def _decode_cached(
    model: Whisper,
    cache: KVCache,
    features: AudioFeatures,
    first: list[int],
    max_length: int,
    tokenizer: Tokenizer,
    options: DecodingOptions,
) -> list[DecodingResult]:
    """Decode the windows of a fresh cache, from the tokens `first` on."""
    windows = len(features.primary)
    tokens = torch.full((windows, max_length), tokenizer.eot, device=model.device)
    tokens[:, : len(first)] = torch.tensor(first, device=model.device)
    sot_index = first.index(tokenizer.sot)
    languages, language_probs = [language_code(options.language or "en")] * windows, None
    if model.is_multilingual and (options.language is None or options.task == "lang_id"):
        detected, language_probs = _detect(model, cache, tokenizer)
        languages = [max(probs, key=probs.__getitem__) for probs in language_probs]
        if options.language is None:
            tokens[:, sot_index + 1] = detected
    probs_of: Sequence[dict[str, float] | None] = language_probs or [None] * windows
    each = [AudioFeatures(*window) for window in zip(features.primary, features.secondary)]
    if options.task == "lang_id":
        return [DecodingResult(*fields) for fields in zip(each, languages, probs_of)]

    drawn = None
    if options.rerank and options.temperature == 0:
        drawn = _draw(model, features, tokens, sot_index, len(first), tokenizer, options)
    found, no_speech = _generate(model, cache, tokens, sot_index, len(first), tokenizer, options)

    def of_window(i: int, found: Candidates) -> list[Candidate]:
        mine = Candidates(*(x[i] for x in found))
        return ranked_candidates(mine, len(first), tokenizer.eot, options.length_penalty)

    results = []
    for i in range(windows):
        ranked = of_window(i, found)
        if drawn is not None:
            ranked = by_risk(ranked, of_window(i, drawn), tokenizer)
        best, logprobs, _ = ranked[0]
        text = tokenizer.decode(best).strip()
        results.append(
            DecodingResult(
                audio_features=each[i],
                language=languages[i],
                language_probs=probs_of[i],
                tokens=best,
                text=text,
                avg_logprob=sum(logprobs) / (len(best) + 1),
                no_speech_prob=no_speech[i],
                temperature=options.temperature,
                compression_ratio=compression_ratio(text),
                logprobs=logprobs[: len(best)],
                alternatives=n_best(ranked, options.n_best or 0, tokenizer),
            )
        )
    return results


def _generate(
    model: Whisper,
    cache: KVCache,
    tokens: Tensor,
    sot_index: int,
    begin: int,
    tokenizer: Tokenizer,
    options: DecodingOptions,
) -> tuple[Candidates, list[float]]:
    """Continue tokens [B, L], of which `begin` are given.

    Returns the candidates [B, N, L], on the CPU, and each window's no-speech probability, which is <|nospeech|>'s at
    <|startoftranscript|>.
    """
    windows, max_length = tokens.shape
    group = options.beam_size or options.best_of or 1
    rules = Rules(model, tokenizer, options)
    search: Search
    hotwords, rest = favoured(model, tokenizer, options, windows * group), (tokenizer.eot, max_length, model.device)
    if options.beam_size:
        search = BeamSearch(windows, group, options.patience, *rest, hotwords)
    else:
        search = Sampling(windows * group, group, options.temperature, *rest, hotwords)

    at_sot, logits = cache.first_logits(model.decoder, tokens[:, :begin], [sot_index, begin - 1]).unbind(dim=1)
    no_speech = torch.full([windows], float("nan"))
    if tokenizer.no_speech is not None:
        no_speech = at_sot.softmax(dim=-1)[:, tokenizer.no_speech]
    if group > 1:
        cache.repeat(group)
        tokens, logits = tokens.repeat_interleave(group, dim=0), logits.repeat_interleave(group, dim=0)

    look_every = LOOK_EVERY if tokens.is_cuda else 1
    leave = not tokens.is_cuda and group == 1  # a GPU's graphs have their rows in place
    for length in range(begin, max_length):
        rules.apply(logits, tokens[:, begin:length])
        done = search.step(tokens, length, logits, cache)
        # rows that are done stay as they are, so that looking late changes nothing
        if length + 1 == max_length or ((length + 1 - begin) % look_every == 0 and bool(done)):
            break
        if leave and isinstance(search, Sampling):
            tokens = search.without_done(tokens, length, cache)
        logits = cache.next_logits(model.decoder, tokens[:, length : length + 1])

    found = search.candidates(tokens)
    return Candidates(*(x.cpu() for x in found)), no_speech.tolist()


def _draw(
    model: Whisper,
    features: AudioFeatures,
    tokens: Tensor,
    sot_index: int,
    begin: int,
    tokenizer: Tokenizer,
    options: DecodingOptions,
) -> Candidates:
    """Samples of each window, behind the first `begin` of its tokens [B, L]."""
    drawing = replace(
        options, temperature=ranking.TEMPERATURE, best_of=ranking.SAMPLES, beam_size=None, patience=None, rerank=None
    )
    with open_cache(model.decoder, features, ranking.SAMPLES, tokens.shape[1] - 1) as cache:
        found, _ = _generate(model, cache, tokens.clone(), sot_index, begin, tokenizer, drawing)
    return found


def favoured(model: Whisper, tokenizer: Tokenizer, options: DecodingOptions, rows: int) -> Hotwords | None:
    """The hotwords asked for, None where there are none."""
    terms = terms_of(options.hotwords)
    if not terms or not options.hotword_strength:
        return None
    tree = prefix_tree(terms, tokenizer.encoding, model.dims.n_vocab, model.device)
    return Hotwords(tree, options.hotword_strength, rows)


@torch.no_grad()
def sample_windows(model: Whisper, features: AudioFeatures, first: Tensor, options: DecodingOptions) -> Tensor:
    """All samples of encoded windows, each after first tokens of its own: first [B, k] -> tokens [B, best_of, n].

    Rows begin with `first` and are filled up with <|endoftext|>.
    """
    options.verify()
    tokenizer = model_tokenizer(model, options.language or "en", options.task)
    begin = first.shape[1]
    max_length = min(begin + (options.sample_len or model.dims.n_text_ctx // 2), model.dims.n_text_ctx + 1)
    tokens = torch.full((len(first), max_length), tokenizer.eot, device=model.device)
    tokens[:, :begin] = first
    with open_cache(model.decoder, features, options.best_of or 1, max_length - 1) as cache:
        found, _ = _generate(model, cache, tokens, 0, begin, tokenizer, options)
    return found.tokens
