"""Files: those written whole or not at all, folders that can be written to, the audio files below a folder."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import DataError, OptionError

MARKS = (  # byte order marks; that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in "aac aif aiff amr au flac m4a mp3 mp4 oga ogg opus sph wav webm wma".split()  # noqa: SIM905
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


def audio_files(folder: Path) -> list[Path]:
    """All audio files below a folder, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES and f.is_file())


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
