"""Who speaks: turns of speakers, from pyannote.audio or any other callable, joined to words and segments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .audio import SAMPLE_RATE
from .errors import OptionError, one_line
from .transcription import Segment, Transcription

PIPELINE = "pyannote/speaker-diarization-community-1"
NEAR = 0.5  # seconds: what lies this close to a turn belongs to it where no turn covers it


@dataclass(frozen=True)
class Turn:
    """What one speaker says in one go, in seconds; the text where it is known."""

    start: float
    end: float
    speaker: str
    text: str = ""


Diarizer = Callable[[np.ndarray], Iterable[Turn]]  # samples [n] at 16 kHz -> turns, in any order, overlapping or not


def with_speakers(result: Transcription, turns: Iterable[Turn]) -> Transcription:
    """The transcription with the speaker of each segment and word: whose turns cover most of it.

    Words need word times; a segment's speaker is then the one of most of its words' time.
    """
    ordered = list(turns)
    return replace(result, segments=[spoken_by(segment, ordered) for segment in result.segments])


def spoken_by(segment: Segment, turns: Sequence[Turn]) -> Segment:
    if segment.words is None:
        return replace(segment, speaker=most_heard([(segment.start, segment.end)], turns))
    words = [replace(word, speaker=most_heard([(word.start, word.end)], turns)) for word in segment.words]
    spans = [(word.start, word.end) for word in segment.words] or [(segment.start, segment.end)]
    return replace(segment, words=words, speaker=most_heard(spans, turns))


def each_speaker(segment: Segment) -> list[Turn]:
    """What each speaker says of a segment with speakers, in its order, as turns with their text.

    Words that are nobody's are those of the speaker before.
    """
    if not segment.words:
        return [Turn(segment.start, segment.end, segment.speaker or "", segment.text)]
    made: list[Turn] = []
    for word in segment.words:
        last = made[-1] if made else None
        if last is not None and word.speaker in (None, last.speaker):
            made[-1] = replace(last, end=word.end, text=last.text + word.word)
        else:
            made.append(Turn(word.start, word.end, word.speaker or segment.speaker or "", word.word))
    return made


def most_heard(spans: Sequence[tuple[float, float]], turns: Sequence[Turn]) -> str | None:
    """Who speaks most of these spans of seconds; the nearest one where nobody does, None where nobody is near."""
    if not turns:
        return None
    starts, ends = np.array([turn.start for turn in turns]), np.array([turn.end for turn in turns])
    shared = np.array([np.minimum(ends, end) - np.maximum(starts, start) for start, end in spans])
    if shared.max() <= 0:  # how far away, as a number below 0
        nearest = int(shared.max(axis=0).argmax())
        return turns[nearest].speaker if shared.max() >= -NEAR else None
    seconds: dict[str, float] = {}
    for turn, time in zip(turns, shared.clip(min=0).sum(axis=0)):
        seconds[turn.speaker] = seconds.get(turn.speaker, 0.0) + float(time)
    return max(seconds, key=seconds.__getitem__)


def pyannote_diarizer(token: str | None, device: torch.device, num_speakers: int | None = None) -> Diarizer:
    """pyannote.audio's pipeline, whose weights its authors give to holders of a Hugging Face token.

    token: that token; None takes it from HF_TOKEN. OptionError where the package or the weights can't be had.
    """
    try:
        from pyannote.audio import Pipeline
    except (ImportError, OSError, RuntimeError) as error:  # or it is there, but not its torchaudio for this torch
        raise OptionError(
            f"--diarize needs pyannote.audio ({one_line(error)}): pip install 'dawhisper[diarize]'"
        ) from error
    try:
        pipeline = Pipeline.from_pretrained(PIPELINE, token=token or os.environ.get("HF_TOKEN"))
    except Exception as error:  # the hub's many: no network, no right, no such file
        pipeline, why = None, one_line(error)
    else:
        why = "no right to it"
    if pipeline is None:
        raise OptionError(
            f"can't load {PIPELINE} ({why}): accept its conditions at https://huggingface.co/{PIPELINE}, and give a "
            "token by --hf_token or HF_TOKEN"
        )
    pipeline.to(device)

    def diarize(samples: np.ndarray) -> Iterable[Turn]:
        waveform = torch.from_numpy(np.ascontiguousarray(samples))[None]
        heard = pipeline({"waveform": waveform, "sample_rate": SAMPLE_RATE}, num_speakers=num_speakers)
        # one speaker at a time, as a transcription is
        tracks = heard.exclusive_speaker_diarization.itertracks(yield_label=True)
        return [Turn(span.start, span.end, speaker) for span, _, speaker in tracks]

    return diarize
