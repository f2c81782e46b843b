"""Files: those written whole or not at all, folders that can be written to, the audio files below a folder."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import DataError, OptionError

MARKS = (  # byte order marks; that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (  # noqa: SIM905
        "3gp aac ac3 aif aiff amr au avi caf flac flv m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpeg mpg oga ogg ogv opus "
        "sph w64 wav webm wma wmv"
    ).split()
)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes the place of `path` when the block ends well."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def audio_files(folder: Path, recursive: bool = True) -> list[Path]:
    """All audio and video files in a folder, and below it, sorted; hidden ones are left out."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(f for f in found if f.suffix.lower() in AUDIO_SUFFIXES and not f.name.startswith(".") and f.is_file())


def writable_folder(folder: Path) -> None:
    """Make the folder and try to write in it, so that hours of work don't end with nothing."""
    probe = folder / ".dawhisper-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(
            f"can't write to the output folder {folder}: {error.strerror}; choose another with --output_dir"
        ) from None


@contextmanager
def reading_text(path: Path, encoding: str | None = None) -> Iterator[IO[str]]:
    """An open text file: of this encoding, or of the one that its byte order mark tells, or else UTF-8.

    DataError, also while it is read, for what is no text of that encoding; nothing is ever replaced.
    """
    with path.open("rb") as file:
        start = file.read(4)
    known = encoding or next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")
    try:
        with path.open(encoding=known, newline="") as text:
            yield text
    except LookupError:
        raise OptionError(f"unknown encoding {encoding!r}; use utf-8, utf-16, cp1252 ...") from None
    except UnicodeDecodeError as error:
        name = "UTF-8" if known == "utf-8-sig" else known
        message = f"not {name} ({error.reason}); name its encoding, for example --encoding cp1252"
        raise DataError(f"{path}:{_undecodable_line(path, known)}: {message}") from None


def text_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file that are not empty."""
    with reading_text(path, encoding) as file:
        yield from (line for line in (raw.rstrip("\r\n") for raw in file) if line.strip())


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file, if it is there; one that a killed run left half written is skipped."""
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").split(
            "\n"
        ):  # a text may hold what splitlines() splits at
            try:
                yield json.loads(line)
            except ValueError:
                continue


def table_rows(
    path: Path, delimiter: str, encoding: str | None = None, header: list[str] | None = None
) -> Iterator[dict[str, str]]:
    """Rows of a table as dicts; the header's names in lower case. In a tab-separated file quotes are plain letters."""
    with reading_text(path, encoding) as file:
        csv.field_size_limit(10_000_000)
        if delimiter == "\t":
            reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(file, delimiter=delimiter)
        names = header or [name.strip().lower() for name in next(reader, [])]
        yield from (dict(zip(names, row)) for row in reader if any(row))


def delimiter_of(path: Path, first: str) -> str:
    """What separates the columns of a table, by its name and its first line."""
    return "\t" if path.suffix.lower() == ".tsv" else max(",;|\t", key=first.count)


def _undecodable_line(path: Path, encoding: str) -> int:
    """Its number; of wide encodings 1, since their lines can't be told apart by bytes."""
    if encoding.startswith(("utf-16", "utf-32")):
        return 1
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 1


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text file, which is replaced whole."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
