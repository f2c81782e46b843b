"""Files: those written whole or not at all, folders that can be written to, the audio files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OptionError

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


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text file, which is replaced whole."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
