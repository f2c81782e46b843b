"""Corpora as other packages know them: cuts and recipes of lhotse, datasets of Hugging Face (the extra `corpora`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dawhisper.audio import SAMPLE_RATE, to_int16
from dawhisper.errors import DataError, OptionError, one_line
from dawhisper.files import replacing

from .manifest import Report, SpokenSegment, Utterance, encode_audio

SPLIT_NAMES = {"valid": "dev", "validation": "dev", "val": "dev", "eval": "test"}
WHOLE = 0.01  # seconds by which a cut may miss its recording's ends and still be all of it


@dataclass(frozen=True)
class DatasetRow:
    """A row of a dataset: its recording's file, its other columns, and its split."""

    audio: Path
    cells: Mapping[str, Any]
    split: str | None


def split_named(text: str) -> str | None:
    """train, dev or test, where a name has it or another word for it in it: "train-clean-100", "cuts_dev.jsonl.gz"."""
    words = re.findall(r"(?<![a-z])(train|dev|test|validation|valid|val|eval)(?![a-z])", text.lower())
    return SPLIT_NAMES.get(words[-1], words[-1]) if words else None


@contextmanager
def _the_extra() -> Iterator[None]:
    """Around imports of what the extra has."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"this needs {error.name}, which is not installed: pip install 'dawhisper[corpora]'"
        raise OptionError(message) from None


# ---- lhotse -------------------------------------------------------------------------------------------------------


def is_lhotse(source: Path) -> bool:
    """Whether it is a manifest of lhotse, or a folder of them."""
    if source.is_dir():
        return any(is_lhotse(file) for kind in ("cuts", "recordings") for file in _manifests(source, kind))
    if source.name.endswith(".jsonl.gz"):
        return True
    return source.suffix == ".jsonl" and any(
        key in _first_line(source) for key in ('"supervisions"', '"sampling_rate"')
    )


def read_lhotse(source: Path, recipe: str, out: Path, report: Report) -> Iterator[tuple[Utterance, str | None]]:
    """The utterances of lhotse's cuts, or of its recordings and supervisions, and their splits.

    recipe: of `lhotse.recipes` ("ami" for prepare_ami), which reads a corpus as it was released; or none. A cut that
    is no plain part of a file (mixed, resampled, one of several channels) is written into `out`, as FLAC.
    """
    with _the_extra():
        import lhotse
        import lhotse.recipes
    try:
        found = _by_recipe(lhotse, source, recipe, out) if recipe else _from_files(lhotse, source)
        listed = [(name, cut) for name, cuts in found for cut in cuts]
    except OptionError:
        raise
    except Exception as error:  # a recipe may raise anything where the corpus is another than it expects
        how = f"lhotse's recipe {recipe}" if recipe else "lhotse"
        raise DataError(f"{how} can't read {source}: {type(error).__name__}: {one_line(error)}") from None
    for name, cut in listed:
        try:
            yield _utterance_of(cut, source, out), split_named(name)
        except Exception as error:  # and for a recording that isn't there
            report.add(f"{name}/{cut.id}", f"not usable: {type(error).__name__}: {one_line(error)}")


def _by_recipe(lhotse: Any, source: Path, recipe: str, out: Path) -> Iterator[tuple[str, Any]]:
    function = getattr(lhotse.recipes, f"prepare_{recipe}", None)
    if function is None:
        raise OptionError(f"lhotse {lhotse.__version__} has no recipe {recipe!r}; `lhotse prepare` lists those it has")
    yield from _cuts_in(lhotse, function(source, output_dir=out / "lhotse"), "")


def _cuts_in(lhotse: Any, made: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """What a recipe returns: recordings and supervisions, by part, and in some by language."""
    if "recordings" in made:
        yield name, _spoken(lhotse, made["recordings"], made.get("supervisions"))
        return
    for part, inner in made.items():
        yield from _cuts_in(lhotse, inner, f"{name}/{part}" if name else part)


def _from_files(lhotse: Any, source: Path) -> Iterator[tuple[str, Any]]:
    files = _manifests(source, "cuts") if source.is_dir() else [source]
    for file in files:
        yield file.name, lhotse.CutSet.from_file(file)
    if not files:
        for file in _manifests(source, "recordings"):
            beside = file.with_name(file.name.replace("recordings", "supervisions"))
            spoken = lhotse.SupervisionSet.from_file(beside) if beside.is_file() else None
            yield file.name, _spoken(lhotse, lhotse.RecordingSet.from_file(file), spoken)


def _spoken(lhotse: Any, recordings: Any, supervisions: Any) -> Any:
    """Cuts of recordings: those parts that were transcribed, or all of them without supervisions."""
    cuts = lhotse.CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    return cuts if supervisions is None else cuts.trim_to_supervisions(keep_overlapping=False)


def _manifests(folder: Path, kind: str) -> list[Path]:
    return sorted(f for f in folder.glob(f"*{kind}*.jsonl*") if f.name.endswith((".jsonl", ".jsonl.gz")))


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(1 << 20).decode("utf-8", "replace")


def _utterance_of(cut: Any, source: Path, out: Path) -> Utterance:
    audio, start, end = _place(cut, source) or (_written(cut, out), None, None)
    said = sorted(cut.supervisions, key=lambda each: each.start)
    texts = [each.text for each in said]
    speakers = {each.speaker for each in said}
    segments = [
        SpokenSegment(round(max(each.start, 0.0), 3), round(min(each.end, cut.duration), 3), each.text) for each in said
    ]
    return Utterance(
        str(audio),
        " ".join(text for text in texts if text) if any(text is not None for text in texts) else None,
        cut.duration,
        next((each.language for each in said if each.language), None),
        speakers.pop() if len(speakers) == 1 else None,
        start,
        end,
        source.name,
        segments=tuple(segments) if len(segments) > 1 else None,
    )


def _place(cut: Any, source: Path) -> tuple[Path, float | None, float | None] | None:
    """The file that a cut is a part of, and which part; None where it is more than that."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1 or recording.num_channels != 1:
        return None
    (only,) = recording.sources
    if only.type != "file":
        return None
    folder = source if source.is_dir() else source.parent
    named = Path(only.source)
    path = named if named.exists() else folder / named
    if cut.start < WHOLE and abs(recording.duration - cut.end) < WHOLE:
        return path.resolve(), None, None
    return path.resolve(), cut.start, cut.end


def _written(cut: Any, out: Path) -> Path:
    """The cut as a file of its own, whole or not at all: the next run takes it as it is."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", cut.id)[:100]
    if name != cut.id:  # other cuts may come to the same letters
        name += "-" + blake2b(cut.id.encode(), digest_size=4).hexdigest()
    path = out.resolve() / "audio" / f"{name}.flac"
    if not path.is_file():
        samples = cut.resample(SAMPLE_RATE).load_audio()  # [channels, n]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(encode_audio(to_int16(np.atleast_2d(samples).mean(axis=0)), "flac"))
    return path


# ---- datasets -----------------------------------------------------------------------------------------------------


def is_dataset(source: Path) -> bool:
    """Whether it is a folder that `Dataset.save_to_disk` has written."""
    return any((source / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_dataset(name: str, out: Path, report: Report) -> Iterator[DatasetRow]:
    """The rows of a dataset: a folder that was saved, or a name on the hub, NAME or NAME:CONFIGURATION.

    Sound that lies in the dataset itself is written into `out`, as it is.
    """
    with _the_extra():
        import datasets
    try:
        if Path(name).is_dir():
            made = datasets.load_from_disk(name)
        else:
            made = datasets.load_dataset(*name.split(":", 1))
    except Exception as error:
        raise DataError(f"datasets can't load {name}: {type(error).__name__}: {one_line(error)}") from None
    for split, rows in made.items() if isinstance(made, dict) else [("", made)]:
        column = next((key for key, feature in rows.features.items() if isinstance(feature, datasets.Audio)), None)
        if column is None:
            raise DataError(f"{name} has no column of audio, but {', '.join(rows.features)}")
        for number, row in enumerate(rows.cast_column(column, datasets.Audio(decode=False))):
            sound = row.pop(column)
            audio = _file_of(sound, out.resolve() / "audio" / (split or "rows"), number) if sound else None
            if audio is None:
                report.add(f"{name}/{split}:{number}", "no audio in the row")
            else:
                yield DatasetRow(audio, row, split_named(split))


def _file_of(sound: Mapping[str, Any], folder: Path, number: int) -> Path | None:
    """The file of a row's recording, written where its bytes are in the dataset."""
    content, name = sound.get("bytes"), sound.get("path")
    if content is None:
        return Path(name) if name else None
    path = folder / f"{number:06d}{Path(name or '').suffix or '.audio'}"
    if not path.is_file() or path.stat().st_size != len(content):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path
