"""What was named on the command line -> recordings: files, folders, globs, addresses, lists, manifests, a pipe."""

from __future__ import annotations

import glob
import io
import itertools
import json
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from dawhisper.errors import DataError, OptionError
from dawhisper.files import AUDIO_SUFFIXES, audio_files, delimiter_of, reading_text, table_rows, text_lines
from dawhisper.transcription import Settings

TABLES, LISTS = (".jsonl", ".csv", ".tsv"), (".txt", ".lst", ".list")
COLUMNS = {
    "audio": ("audio", "path", "file", "audio_path", "audio_filepath"),
    "language": ("language", "lang"),
    "task": ("task",),
    "initial_prompt": ("prompt", "initial_prompt"),
    "name": ("name",),
    "start": ("start",),
    "end": ("end",),
}


class Content(io.BytesIO):
    """A recording's bytes, with the name that messages call it by."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


@dataclass(frozen=True)
class Input:
    """A recording to transcribe: a path, an address or bytes.

    output: where its outputs are below the output folder, without their suffix. folder: a part of that, given by the
    place below a folder that was named. settings: what its manifest says of it alone.
    """

    source: str | Content
    output: str = ""
    folder: str = ""
    settings: Settings = field(default_factory=Settings)

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.source if isinstance(self.source, str) else self.source.name

    @property
    def path(self) -> PurePosixPath | Path:
        """A path that tells its name."""
        if not isinstance(self.source, str):
            return Path("stdin")
        address = urlsplit(self.source)
        return PurePosixPath(unquote(address.path) or address.netloc) if is_address(self.source) else Path(self.source)


def is_address(name: str) -> bool:
    return "://" in name


def find_inputs(named: Sequence[str], recursive: bool = False) -> list[Input]:
    """All that was named, each recording once, with outputs of its own; in the same order at every call.

    Raises OptionError and DataError for a folder or glob without recordings and for a manifest that can't be read.
    A recording that isn't there is in the list: it fails when its turn comes.
    """
    several = len(named) > 1
    listed = [each for name in named for each in _listed(name, recursive, several)]
    once: dict[tuple[object, ...], Input] = {}
    for each in listed:
        once.setdefault((each.source, each.settings, each.output), each)
    if again := len(listed) - len(once):
        warnings.warn(f"{again} recording(s) are named more than once; each is transcribed once", stacklevel=2)
    return with_outputs(list(once.values()))


def _listed(name: str, recursive: bool, several: bool) -> Iterator[Input]:
    path = Path(name)
    if name == "-":
        yield Input(Content(sys.stdin.buffer.read(), "standard input"))
    elif is_address(name):
        yield Input(name)
    elif name and _is(path.is_dir):  # an empty name would be the folder where we are
        yield from _in_folder(path, recursive, several)
    elif glob.has_magic(name) and not _is(path.exists):
        yield from _matching(name, recursive)
    elif path.suffix.lower() in TABLES and _is(path.is_file):
        yield from _in_table(path)
    elif path.suffix.lower() in LISTS and _is(path.is_file):
        yield from (Input(_beside(path, line.strip())) for line in text_lines(path))
    else:
        yield Input(name)


def _is(question: Any) -> bool:
    """Whether a path is something; names that no disk can have are nothing."""
    try:
        return bool(question())
    except (OSError, ValueError):
        return False


def _in_folder(root: Path, recursive: bool, several: bool) -> Iterator[Input]:
    files = audio_files(root, recursive)
    if not files:
        hint = "check its name" if recursive else "--recursive looks in the folders below it"
        raise OptionError(f"no audio or video files in the folder {root}; {hint}")
    above = root.resolve().name if several and recursive else ""
    for file in files:
        yield Input(str(file), folder=(PurePosixPath(above) / file.parent.relative_to(root).as_posix()).as_posix())


def _matching(pattern: str, recursive: bool) -> Iterator[Input]:
    """The recordings of a glob; any file where the pattern tells its suffix. (`**` is any folders.)"""
    suffix = Path(pattern).suffix.lower()
    known = AUDIO_SUFFIXES if glob.has_magic(suffix) or not suffix else {suffix}
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (Path.glob takes no /a/*)
    files = [file for file in found if file.suffix.lower() in known and file.is_file()]
    if not files:
        raise OptionError(f"no audio or video file matches {pattern}; check the pattern")
    yield from (each for file in files for each in _listed(str(file), recursive, False))


def _in_table(path: Path) -> Iterator[Input]:
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}: row {number}"
        if "offset" in row:
            raise DataError(f"{where} points into a shard, which is for training; name the recordings' files")
        cells = {
            key: next((row[name] for name in names if row.get(name) not in (None, "")), None)
            for key, names in COLUMNS.items()
        }
        audio, name, start, end = (cells.pop(key) for key in ("audio", "name", "start", "end"))
        if not isinstance(audio, str):
            raise DataError(f"{where} names no recording; the column is one of {', '.join(COLUMNS['audio'])}")
        clip = ",".join(str(time) for time in (start or 0, end) if time is not None)
        try:
            settings = Settings(**cells, clip_timestamps=clip if clip != "0" else None)
        except OptionError as error:
            raise DataError(f"{where}: {error}") from None
        yield Input(_beside(path, audio), _below(str(name or ""), where), settings=settings)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL, CSV or TSV file; those of a table have a header."""
    if path.suffix.lower() != ".jsonl":
        first = next(text_lines(path), "")
        yield from table_rows(path, delimiter_of(path, first))
        return
    with reading_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise DataError(f"{path}:{number}: not a line of JSON ({error})") from None
            if row is not None and not isinstance(row, dict):
                raise DataError(f'{path}:{number}: a line is {{"audio": PATH, ...}}, not {line.strip()[:60]}')
            if row is not None:
                yield row


def _beside(listing: Path, name: str) -> str:
    """A path that a list names: beside the list, or else from here."""
    if is_address(name):
        return name
    beside = listing.parent / name
    return str(beside) if _is(beside.exists) or not _is(Path(name).exists) else name


def _below(name: str, where: str) -> str:
    """A name for outputs that leads nowhere else than below the output folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataError(f"{where}: the name {name!r} leads out of the output folder")
    return path.as_posix() if name else ""


# ---- names of outputs ---------------------------------------------------------------------------------------------


def with_outputs(inputs: Sequence[Input]) -> list[Input]:
    """Each with a name for its outputs that no other has: its stem, or where stems clash, more of its path.

    Names that some disks take for the same, by case or by how an accent is written, are the same here too. Raises
    DataError where manifests give one name twice.
    """
    given = Counter(alike(each.output) for each in inputs if each.output)
    if twice := [name for name, count in given.items() if count > 1]:
        raise DataError(f"{len(twice)} name(s) of outputs are given to more than one recording, such as {twice[0]!r}")
    free = [each for each in inputs if not each.output]
    stems = Counter(alike(_joined(each, each.path.stem)) for each in free)
    names = Counter(alike(_joined(each, each.path.name)) for each in free)
    made, changed = [], []
    taken = set(given)
    for each in inputs:
        if each.output:
            made.append(each)
            continue
        path = each.path
        stem, name = _joined(each, path.stem), _joined(each, path.name)
        wanted = stem if stems[alike(stem)] == 1 else name
        if stems[alike(stem)] > 1 and names[alike(name)] > 1:
            wanted = _joined(each, f"{Path(path).absolute().parent.name}_{path.name}")
        numbered = (f"{wanted}_{i}" for i in itertools.count(2))
        found = next(n for n in itertools.chain([wanted], numbered) if alike(n) not in taken)
        taken.add(alike(found))
        changed += [found] if found != stem else []
        made.append(replace(each, output=found))
    if changed:
        some = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
        warnings.warn(f"{len(changed)} recordings share a name; their outputs are called {some}", stacklevel=3)
    return made


def _joined(each: Input, name: str) -> str:
    return (PurePosixPath(each.folder) / name).as_posix()


def alike(name: str) -> str:
    """What names have in common that a disk may take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
