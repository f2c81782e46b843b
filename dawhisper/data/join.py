"""Windows of several clips, as Whisper meets them in long recordings: `dawhisper join`.

A corpus of sentences never shows a model a second one in its window. Clips of one speaker, with pauses between them,
become windows whose manifest says when each is spoken, so that targets have a time stamp between sentences too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dawhisper.audio import SAMPLE_RATE
from dawhisper.errors import DataError, OptionError
from dawhisper.files import writable_folder
from dawhisper.options import option

from .loader import with_durations
from .manifest import (
    MAX_SECONDS,
    SLACK_SECONDS,
    Report,
    SpokenSegment,
    Utterance,
    decode_audio,
    encode_audio,
    read_manifest,
    write_manifest,
)
from .processes import in_processes
from .targets import NO_SPACE_LANGUAGES, whisper_language

Clips = list[tuple[Utterance, float]]  # each with the pause before it, in seconds


@dataclass(frozen=True)
class JoinOptions:
    """What `dawhisper join` takes.

    manifests: of clips with text, or labelled with a teacher's; out: folder for the windows (FLAC) and manifest.jsonl.
    seconds: shortest and longest window; pause: shortest and longest silence between two clips, in seconds.
    """

    manifests: Sequence[str] = option(
        help="clips with text, or labelled by dawhisper prepare", positional=True, metavar="MANIFEST"
    )
    out: str = option(help="folder for the windows and manifest.jsonl", metavar="DIR")
    seconds: tuple[float, float] = option((12.0, 29.0), "length of a window", metavar=("MIN", "MAX"))
    pause: tuple[float, float] = option((0.1, 0.8), "seconds between two clips", metavar=("MIN", "MAX"))
    seed: int = option(0, "of the lengths and pauses")
    workers: int | None = option(None, "processes; as many as there are cores by default")

    def __post_init__(self) -> None:
        for name, (low, high) in (("seconds", self.seconds), ("pause", self.pause)):
            if not 0 <= low <= high <= MAX_SECONDS:
                rule = f"two numbers from 0 to {MAX_SECONDS:g}, the smaller one first"
                raise OptionError(f"--{name} is {rule}, not {low} {high}")


def join_clips(options: JoinOptions) -> str:
    """Write the windows; returns what was written. DataError where no clips can be joined."""
    report = Report()
    utterances = with_durations([u for path in options.manifests for u in read_manifest(path, report)])
    windows = list(plan_windows(utterances, options))
    if not windows:
        raise DataError(
            f"no {options.seconds[0]:g} s of one speaker in these {len(utterances)} clips with text: "
            "nothing to join; lower --seconds"
        )
    out = Path(options.out)
    writable_folder(out)
    jobs = [(clips, out / f"{number:06d}.flac") for number, clips in enumerate(windows)]
    with tqdm(in_processes(_write, jobs, options.workers), total=len(jobs), unit="window", disable=None) as bar:
        made = list(bar)
    for _, why in made:
        if why:
            report.add(*why)
    joined = [u for u, _ in made if u is not None]
    manifest = out / "manifest.jsonl"
    write_manifest(manifest, joined)
    hours = sum(u.duration for u in joined) / 3600
    used = sum(len(u.segments or ()) for u in joined)
    skipped = f"; {report}" if len(report) else ""
    return f"{manifest}: {len(joined)} windows of {used} clips, {hours:.2f} h{skipped}"


def plan_windows(utterances: Sequence[Utterance], options: JoinOptions) -> Iterator[Clips]:
    """Windows of clips of one speaker, source and language, in their order. Each clip is used once at most."""
    rng = np.random.default_rng(options.seed)
    shortest, longest = options.seconds
    groups: dict[tuple[object, ...], list[Utterance]] = defaultdict(list)
    for u in utterances:
        if (u.text or u.teacher_text) and 0 < u.duration <= longest:
            groups[u.speaker, u.source, u.language, u.teacher_language, bool(u.text)].append(u)
    for group in groups.values():
        for window, length in _cut(group, options, rng):
            if len(window) > 1 and length >= shortest:
                yield window


def _cut(clips: Sequence[Utterance], options: JoinOptions, rng: np.random.Generator) -> Iterator[tuple[Clips, float]]:
    """All the clips in windows, each about as long as was drawn for it, with their seconds; some are too short."""
    shortest, longest = options.seconds
    window: Clips = []
    length, enough = 0.0, rng.uniform(shortest, longest)
    for u in clips:
        pause = rng.uniform(*options.pause) if window else 0.0
        if window and (length + pause + u.duration > longest or length >= enough):
            yield window, length
            window, length, pause, enough = [], 0.0, 0.0, rng.uniform(shortest, longest)
        window.append((u, pause))
        length += pause + u.duration
    yield window, length


def _write(job: tuple[Clips, Path]) -> tuple[Utterance | None, tuple[str, str] | None]:
    """The window that was written, or what could not be read and why."""
    clips, path = job
    sound, segments, at = [], [], 0
    for u, pause in clips:
        try:
            audio = decode_audio(u)
        except DataError as error:
            return None, (u.name, str(error))
        silence = round(pause * SAMPLE_RATE)
        sound += [np.zeros(silence, np.int16), audio]
        start, at = at + silence, at + silence + len(audio)
        if at > (MAX_SECONDS + SLACK_SECONDS) * SAMPLE_RATE:
            return None, (u.name, "longer than its manifest says")
        begin, end = (min(round(place / SAMPLE_RATE, 3), MAX_SECONDS) for place in (start, at))
        segments.append(SpokenSegment(begin, end, u.text, u.teacher_text))
    whole = np.concatenate(sound)[: int(MAX_SECONDS * SAMPLE_RATE)]
    path.write_bytes(encode_audio(whole, "flac"))
    first = clips[0][0]
    return Utterance(
        audio=str(path),
        text=_together([s.text for s in segments], first.language),
        duration=len(whole) / SAMPLE_RATE,
        language=first.language,
        speaker=first.speaker,
        source=first.source,
        teacher_text=_together([s.teacher_text for s in segments], first.teacher_language or first.language),
        teacher_language=first.teacher_language,
        segments=tuple(segments),
    ), None


def _together(texts: Sequence[str | None], language: str | None) -> str | None:
    """One text of all, None where one is missing."""
    space = "" if whisper_language(language) in NO_SPACE_LANGUAGES else " "
    return space.join(t.strip() for t in texts if t) if all(texts) else None
