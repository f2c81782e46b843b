"""Whether a recording's file ends before it should: what formats say of their own length, which ffmpeg overlooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

OPEN_END = 0x7FFFF000  # of RIFF: from here on a size stands for "not known", written to a pipe
SLACK = 64  # bytes; many writers miscount their headers
OGG_PAGE = 65307  # bytes of the longest
TS_PACKET = 188
W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def is_cut_off(file: BinaryIO) -> bool:
    """Whether a WAV, AIFF, AVI, W64, CAF, MP4, Matroska, Ogg or MPEG-TS file lacks its end; of others, False.

    The file is left at its beginning.
    """
    size = file.seek(0, 2)
    head = _bytes_at(file, 0, TS_PACKET + 1)
    declared = _declared_size(file, head, size)
    if head[:4] == b"OggS":
        cut = not _ends_ogg(_bytes_at(file, max(size - OGG_PAGE, 0), OGG_PAGE))
    elif head[:1] == head[TS_PACKET:] == b"G":
        cut = size % TS_PACKET != 0
    else:
        cut = declared is not None and declared > size + SLACK
    file.seek(0)
    return cut


def _bytes_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _declared_size(file: BinaryIO, head: bytes, size: int) -> int | None:
    """How many bytes the file says it has; None: it does not say."""
    if head[:4] in (b"RIFF", b"FORM"):
        told = int.from_bytes(head[4:8], "little" if head[:1] == b"R" else "big")
        return told + 8 if 0 < told < OPEN_END else None
    if head.startswith(W64):
        return int.from_bytes(head[16:24], "little")
    if head.startswith(EBML):
        return _end_of_segment(head)
    if head[4:8] == b"ftyp":
        return _end_of_boxes(file, 0, size, _box)
    if head[:4] == b"caff":
        return _end_of_boxes(file, 8, size, _chunk)
    return None


def _end_of_boxes(file: BinaryIO, at: int, size: int, length: Callable[[bytes], int | None]) -> int | None:
    """Where the last of the boxes ends, which follow each other from `at` on."""
    while at < size:
        box = length(_bytes_at(file, at, 16))
        if box is None:
            return None
        at += box
    return at


def _box(head: bytes) -> int | None:
    """Bytes of an MP4 box; None: to the file's end, or no box."""
    told = int.from_bytes(head[:4], "big")
    told = int.from_bytes(head[8:], "big") if told == 1 else told
    return told if told >= 8 and head[4:8].isalnum() else None


def _chunk(head: bytes) -> int | None:
    """Bytes of a CAF chunk; None: to the file's end."""
    told = int.from_bytes(head[4:12], "big", signed=True)
    return None if told < 0 else told + 12


def _end_of_segment(head: bytes) -> int | None:
    """Where a Matroska file's segment ends, by its size; None: it was recorded live."""
    at = head.find(SEGMENT) + len(SEGMENT)
    if at < len(SEGMENT) or at >= len(head):
        return None
    width = 9 - head[at].bit_length()  # bytes of the size: the leading zeros of the first, and it
    told = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return None if told == (1 << 7 * width) - 1 else at + width + told


def _ends_ogg(tail: bytes) -> bool:
    """Whether the last page is whole. Browsers that record don't mark it as the last one."""
    page = tail[tail.rfind(b"OggS") :]
    segments = page[26] if len(page) > 26 else 0
    return len(page) > 26 and len(page) >= 27 + segments + sum(page[27 : 27 + segments])
