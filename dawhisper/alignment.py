"""A recording and its text -> when each of the text's words is spoken: `dawhisper align`.

The recording is transcribed, and what was heard is matched with the text in order; so a rough time of every word is
known. With it the text is dealt out to windows of up to 30 s that begin and end in pauses, and in each of them the
cross-attention is aligned with the given words (timing.py), whatever was heard there.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from whisper.audio import CHUNK_LENGTH, HOP_LENGTH, SAMPLE_RATE
from whisper.tokenizer import Tokenizer
from whisper.utils import compression_ratio, format_timestamp

from .audio import Source, load_audio
from .checkpoint import MODEL_HELP, OWN_MODEL, load_model
from .decoding import encode_text, model_tokenizer
from .device import DEVICE_HELP, DTYPE_HELP, DTYPE_NAMES, THREADS_HELP
from .edits import common
from .errors import OptionError, one_line
from .files import writable_folder
from .model import Whisper
from .options import option
from .timing import TimedText, Word, add_word_times, find_alignment
from .transcribe import transcribe
from .transcribe_files import WriterOptions, output_paths, write_outputs
from .transcription import Segment, TranscribeOptions, Transcription
from .window import encode_batch, mel_batch

LONGEST = 26.0  # seconds of a window between the rough times of its words, which pauses around them are added to
SHORTEST = 10.0  # from here on a window may end, in the longest pause there is
MARGIN = 0.5  # seconds of a pause that a window takes at either side at most
A_WORD = 0.5  # seconds that a word takes about, where nothing tells its time
LEAST_HEARD = 0.4  # of the text's words; less is another text
WORTH_TELLING = 8  # words in a row that one has and the other does not
LONG_SENTENCE = 16  # words; a longer one also ends in a pause
PAUSE = 0.5  # seconds
LONG_SEGMENT = 10.0  # seconds; a longer one also ends in a short pause
SHORT_PAUSE = 0.1  # seconds between two words; a phrase begins behind it


@dataclass(frozen=True, kw_only=True)
class AlignOptions(WriterOptions):
    """A recording and its text, by which model, and where the times go."""

    audio: str = option(help="audio or video file", positional=True)
    text: str = option(help="its text: a UTF-8 file, or - for standard input", positional=True)
    model: str = option(OWN_MODEL, MODEL_HELP)
    language: str | None = option(None, "language spoken, by code or English name; None detects it")
    device: str | None = option(None, DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPE_NAMES)
    batch_size: int = option(8, "windows heard together")
    threads: int = option(0, THREADS_HELP)
    output_dir: str = option(".", "folder for the outputs", short="-o")


@dataclass(frozen=True)
class GivenWord:
    """A word of the text with its tokens, and the number of the sentence that it is in; punctuation is a word too."""

    word: str
    tokens: list[int]
    sentence: int

    @property
    def key(self) -> str:
        return bare(self.word)


@dataclass
class Rough:
    """About when each of the given words is spoken, in seconds; `certain` [n]: it was heard, `paused` [n]: behind a
    pause.
    """

    start: np.ndarray
    end: np.ndarray
    certain: np.ndarray
    paused: np.ndarray
    unsaid: list[tuple[float, float, str]] = field(default_factory=list)  # what was heard, but is not in the text


def align_file(options: AlignOptions) -> list[str]:
    """Write the word times of a recording's text; returns the names of the files."""
    text = read_text(options.text)
    writable_folder(Path(options.output_dir))
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model, options.device, options.dtype)
    result = align(model, options.audio, text, options.language, options.batch_size)
    name, folder = Path(options.audio).stem, Path(options.output_dir)
    write_outputs(result, name, folder, options)
    return [str(path) for path in output_paths(name, folder, options).values()]


def read_text(source: str) -> str:
    """A file's text, or that of standard input for "-". OptionError where there is none."""
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"can't read the text {source}: {one_line(error)}; give a UTF-8 file, or - for input"
        ) from error


def align(model: Whisper, audio: Source, text: str, language: str | None = None, batch_size: int = 8) -> Transcription:
    """When the words of `text` are spoken in a recording: a segment for each line or sentence, all with words.

    Raises OptionError for a text that is not this recording's, and warns of passages that only one of them has.
    """
    if not text.strip():
        raise OptionError("there is no text to align: give the words that are spoken in the recording")
    samples = load_audio(audio)
    options: dict[str, Any] = {"language": language, "batch_size": batch_size, "word_timestamps": True}
    heard = transcribe(model, samples, **options)
    assert isinstance(heard, Transcription)
    tokenizer = model_tokenizer(model, heard.language, "transcribe")
    given = given_words(text, tokenizer)
    rough = rough_times(given, [w for s in heard.segments for w in s.words or ()], len(samples) / SAMPLE_RATE)
    check_fit(given, rough, heard.language)
    words = timed_words(model, tokenizer, samples, given, rough)
    segments = list(into_segments(words, tokenizer))
    return Transcription("".join(segment.text for segment in segments), segments, heard.language)


def given_words(text: str, tokenizer: Tokenizer) -> list[GivenWord]:
    """The text's words, sentence by sentence; a line ends a sentence too."""
    sentences = [part for line in text.splitlines() for part in re.split(r"(?<=[.!?…])\s+|(?<=[。！？])", line)]
    made = []
    for number, sentence in enumerate(sentence for sentence in sentences if sentence.strip()):
        tokens = encode_text(tokenizer, " ".join(sentence.split()))
        made += [GivenWord(word, ids, number) for word, ids in zip(*tokenizer.split_to_word_tokens(tokens))]
    return made


def bare(word: str) -> str:
    """What words are compared by: letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", word).lower()


def rough_times(given: Sequence[GivenWord], heard: Sequence[Word], duration: float) -> Rough:
    """About when the given words are spoken: as those that were heard in the same order, and evenly in between."""
    spoken = [i for i, word in enumerate(given) if word.key]
    heard = [word for word in heard if bare(word.word)]
    matched = common([given[i].key for i in spoken], [bare(word.word) for word in heard])
    pairs = [(spoken[i], j) for i, j in matched]
    certain = np.zeros(len(given), bool)
    certain[[i for i, _ in pairs]] = True
    paused = np.zeros(len(given), bool)
    paused[[i for i, j in pairs if j and heard[j].start - heard[j - 1].end >= SHORT_PAUSE]] = True
    # words before the first and behind the last one that was heard take time as well
    n, first, last = len(given), pairs[0] if pairs else (0, -1), pairs[-1] if pairs else (0, -1)
    before = max(0.0, heard[first[1]].start - A_WORD * first[0]) if pairs else 0.0
    behind = min(duration, heard[last[1]].end + A_WORD * (n - 1 - last[0])) if pairs else duration
    places = [-1, *(i for i, _ in pairs), n]
    starts = [before, *(heard[j].start for _, j in pairs), behind]
    ends = [before, *(heard[j].end for _, j in pairs), behind]
    gaps = itertools.pairwise([(-1, -1), *pairs, (n, len(heard))])
    unsaid = [heard[j + 1 : k] for (_, j), (_, k) in gaps if k - j > WORTH_TELLING]
    return Rough(
        np.interp(np.arange(n), places, starts),
        np.interp(np.arange(n), places, ends),
        certain,
        paused,
        [(words[0].start, words[-1].end, "".join(word.word for word in words)) for words in unsaid],
    )


def check_fit(given: Sequence[GivenWord], rough: Rough, language: str) -> None:
    """OptionError where too little of the text was heard; a warning for each longer passage that was not."""
    words = [i for i, word in enumerate(given) if word.key]
    heard = int(rough.certain.sum())
    if heard < LEAST_HEARD * len(words):
        raise OptionError(
            f"this is not what is spoken in the recording: of the text's {len(words)} words {heard} were heard in "
            f"their order; give the recording's own text, and its language if that is not {language!r}"
        )
    for missed, group in itertools.groupby(words, key=lambda i: not rough.certain[i]):
        run = list(group)
        if missed and len(run) > WORTH_TELLING:
            said = "".join(given[i].word for i in run)
            warn_of("in the text, but not heard", rough.start[run[0]], rough.end[run[-1]], said)
    for start, end, said in rough.unsaid:
        warn_of("heard, but not in the text", start, end, said)


def warn_of(what: str, start: float, end: float, text: str) -> None:
    text = text.strip()
    shown = text if len(text) <= 60 else text[:57] + "..."
    warnings.warn(f"{what}, {format_timestamp(start)} to {format_timestamp(end)}: {shown}", stacklevel=3)


def windows(given: Sequence[GivenWord], rough: Rough, most_tokens: int) -> Iterator[tuple[int, int]]:
    """First word and end of each window: as long as it may be, ending in the longest pause of its last part."""
    n, first = len(given), 0
    pause = np.append(rough.start[1:] - rough.end[:-1], math.inf)  # behind each word
    sure = np.append(rough.certain[1:] & rough.certain[:-1], True)
    tokens = np.cumsum([0, *(len(word.tokens) for word in given)])
    while first < n:
        fits = (rough.end[first:] - rough.start[first] <= LONGEST) & (
            tokens[first + 1 :] - tokens[first] <= most_tokens
        )
        end = first + max(1, int(np.argmin(fits)) if not fits.all() else n - first)
        if end < n:
            late = [k for k in range(first, end) if rough.end[k] - rough.start[first] >= SHORTEST] or [end - 1]
            end = 1 + max(late, key=lambda k: (bool(sure[k]), pause[k]))
        yield first, end
        first = end


def phrases(given: Sequence[GivenWord], rough: Rough, first: int, end: int) -> Iterator[range]:
    """A window's words between the ends of sentences and the pauses that were heard: a phrase's own times keep its
    first word from taking the pause before it.
    """
    start = first
    for i in range(first + 1, end):
        if rough.paused[i] or given[i].sentence != given[i - 1].sentence:
            yield range(start, i)
            start = i
    yield range(start, end)


def timed_words(
    model: Whisper, tokenizer: Tokenizer, samples: np.ndarray, given: Sequence[GivenWord], rough: Rough
) -> list[tuple[int, Word]]:
    """Each word with its sentence's number."""
    duration = len(samples) / SAMPLE_RATE
    defaults = TranscribeOptions()
    made: list[tuple[int, Word]] = []
    for first, end in windows(given, rough, model.dims.n_text_ctx - 8):
        before = rough.end[first - 1] if first else 0.0
        behind = rough.start[end] if end < len(given) else duration
        start = max(0.0, rough.start[first] - min(MARGIN, max(0.0, rough.start[first] - before) / 2))
        stop = min(duration, rough.end[end - 1] + min(MARGIN, max(0.0, behind - rough.end[end - 1]) / 2))
        start = math.floor(start * 100) / 100  # whole spectrogram frames
        clip = samples[round(start * SAMPLE_RATE) : round(min(stop, start + CHUNK_LENGTH) * SAMPLE_RATE)]
        if not len(clip):
            raise OptionError(f"the text goes on where the recording ends, at {format_timestamp(duration)}")
        features = encode_batch(model, mel_batch(model, [clip]))
        parts = list(phrases(given, rough, first, end))
        texts = [
            TimedText(
                [t for i in part for t in given[i].tokens], float(rough.start[part[0]]), float(rough.end[part[-1]])
            )
            for part in parts
        ]
        last_end = made[-1][1].end if made else 0.0
        punctuation = (defaults.prepend_punctuations, defaults.append_punctuations)
        tokens = [token for text in texts for token in text.tokens]
        alignment = find_alignment(model, tokenizer, tokens, features, -(-len(clip) // HOP_LENGTH))
        timed = add_word_times(texts, alignment, start, last_end, *punctuation)
        made += [(given[part[0]].sentence, word) for part, each in zip(parts, timed) for word in each.words]
    return made


def at_pauses(sentence: list[Word]) -> Iterator[list[Word]]:
    """A long sentence cut at its longest pauses; what takes long, as a text without full stops does, at short ones."""
    rest = [sentence]
    while rest:
        part = rest.pop()
        pauses = [b.start - a.end for a, b in itertools.pairwise(part)]
        takes_long = part[-1].end - part[0].start > LONG_SEGMENT
        if len(part) > LONG_SENTENCE and max(pauses) >= (SHORT_PAUSE if takes_long else PAUSE):
            cut = pauses.index(max(pauses)) + 1
            rest += [part[cut:], part[:cut]]
        else:
            yield part


def into_segments(words: Sequence[tuple[int, Word]], tokenizer: Tokenizer) -> Iterator[Segment]:
    """A segment for each sentence; a long one also ends in pauses."""
    number = 0
    for _, group in itertools.groupby(words, key=lambda pair: pair[0]):
        for part in at_pauses([word for _, word in group]):
            text = "".join(word.word for word in part)
            yield Segment(
                id=number,
                seek=0,
                start=part[0].start,
                end=part[-1].end,
                text=text,
                tokens=tokenizer.encode(text, disallowed_special=()),
                temperature=0.0,
                avg_logprob=float(np.mean([math.log(max(word.probability, 1e-10)) for word in part])),
                compression_ratio=compression_ratio(text),
                no_speech_prob=0.0,
                words=part,
            )
            number += 1
