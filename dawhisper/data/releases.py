"""What a source lists: releases of corpora, folders, tables, manifests -> utterances, with the release's own splits.

A new format is a function with a name in SOURCE_FORMATS.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dawhisper.errors import DataError
from dawhisper.files import AUDIO_SUFFIXES, audio_files, delimiter_of, table_rows, text_lines

from .corpora import SPLIT_NAMES, is_dataset, is_lhotse, read_dataset, read_lhotse
from .manifest import COLUMNS, Report, Utterance, read_manifest

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Source:
    """What is read: a file, a folder or the name of a dataset, and what it may not tell by itself.

    format: of SOURCE_FORMATS, or "lhotse:RECIPE". kind: speech, noise or rir. out: folder for what must be unpacked.
    """

    name: str
    format: str
    kind: str
    language: str | None
    encoding: str | None
    out: Path

    @property
    def path(self) -> Path:
        return Path(self.name)


@dataclass(frozen=True)
class CorpusItem:
    """What a source lists: an utterance and the official split it belongs to, if the release has splits."""

    utterance: Utterance
    split: str | None = None


def detect_format(source: Path) -> str:
    """Which of SOURCE_FORMATS a file or folder is."""
    if is_lhotse(source):
        return "lhotse"
    if source.is_file():
        by_suffix = {".jsonl": "manifest", ".tar": "manifest", ".csv": "table", ".tsv": "table"}
        if source.suffix.lower() not in by_suffix:
            raise DataError(f"{source} is neither a folder nor a .jsonl, .tar, .csv or .tsv file")
        return by_suffix[source.suffix.lower()]
    if (source / "manifest.jsonl").is_file() or (any(source.glob("*.tar")) and not any(source.glob("*.tsv"))):
        return "manifest"
    if is_dataset(source):
        return "datasets"
    if _common_voice_folders(source):
        return "commonvoice"
    if _fleurs_folders(source):
        return "fleurs"
    if (source / "metadata.csv").is_file() and (source / "wavs").is_dir():
        return "ljspeech"
    if next(source.rglob("*.trans.txt"), None):
        return "librispeech"
    return "folder"


def _librispeech(source: Source, report: Report) -> Iterator[CorpusItem]:
    """SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with "ID TEXT" lines, and ID.flac beside them."""
    for transcript in sorted(source.path.rglob("*.trans.txt")):
        speaker = transcript.name.split("-")[0]
        subset = transcript.parent.parent.parent.name
        official = next((s for s in SPLITS if subset.startswith(s)), None)
        files = {f.stem: f for f in transcript.parent.iterdir() if f.suffix.lower() in AUDIO_SUFFIXES}
        for line in text_lines(transcript, source.encoding):
            name, _, text = line.partition(" ")
            audio = files.get(name, transcript.parent / f"{name}.flac")
            yield _item(audio, text, source.language or "en", f"libri-{speaker}", subset, official)


def _release_folders(root: Path, is_release: Callable[[Path], bool]) -> list[Path]:
    """The folder itself, or those one or two levels below it (a release of several languages)."""
    level = [root] if root.is_dir() else []
    for depth in range(3):
        found = [folder for folder in level if is_release(folder)]
        if found or depth == 2:
            return found
        level = [Path(entry) for folder in level for entry in sorted(_subfolders(folder))]
    return []


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:  # a folder of clips may have a million files
        return [entry.path for entry in entries if entry.is_dir()]


def _common_voice_folders(root: Path) -> list[Path]:
    return _release_folders(
        root, lambda p: (p / "clips").is_dir() and any((p / f"{n}.tsv").is_file() for n in ("validated", "train"))
    )


def _common_voice(source: Source, report: Report) -> Iterator[CorpusItem]:
    """train/dev/test.tsv and clips/. What is only in validated.tsv goes to train, but for the speakers of dev and test.

    (The official training split leaves out most validated clips: in a small language that is a large share.)
    """
    for folder in _common_voice_folders(source.path):
        seen: set[str] = set()
        held_out: set[str | None] = set()
        for name in ("test", "dev", "train", "validated"):
            if not (folder / f"{name}.tsv").is_file():
                continue
            here: set[str] = set()
            for row in table_rows(folder / f"{name}.tsv", "\t", source.encoding):
                speaker, path = row.get("client_id") or None, row.get("path") or ""
                here.add(path)
                if name in ("test", "dev"):
                    held_out.add(speaker)
                if path in seen or (name == "validated" and seen and speaker in held_out):
                    continue
                audio = folder / "clips" / path
                if not audio.suffix:
                    audio = audio.with_name(f"{path}.mp3")
                language = row.get("locale") or row.get("language") or source.language or folder.name
                official = name if name != "validated" else ("train" if seen else None)
                short = f"cv-{speaker[:12]}" if speaker else None
                yield _item(audio, row.get("sentence"), language, short, f"commonvoice/{language}", official)
            seen |= here


def _fleurs_folders(root: Path) -> list[Path]:
    return _release_folders(root, lambda p: (p / "audio").is_dir() and any((p / f"{s}.tsv").is_file() for s in SPLITS))


FLEURS_LANGUAGES = {"cmn": "zh", "fil": "tl", "nb": "no", "jv": "jw"}  # where its first part is not Whisper's code


def _fleurs(source: Source, report: Report) -> Iterator[CorpusItem]:
    """LANG/{train,dev,test}.tsv (id, file, raw text, ...; no header) and LANG/audio/SPLIT/ or audio/SPLIT.tar.gz."""
    for folder in _fleurs_folders(source.path):
        code = folder.name.split("_")[0]
        language = FLEURS_LANGUAGES.get(code, code) if "_" in folder.name else (source.language or code)
        for split in SPLITS:
            if not (folder / f"{split}.tsv").is_file():
                continue
            audio = _fleurs_audio(folder, split, source.out, report)
            for line in text_lines(folder / f"{split}.tsv", source.encoding):
                columns = line.split("\t")
                text = columns[2] if len(columns) > 2 else None
                file = audio / columns[1] if len(columns) > 1 else folder / f"{split}.tsv"
                yield _item(file, text, language, None, f"fleurs/{folder.name}", split)


def _fleurs_audio(folder: Path, split: str, out: Path, report: Report) -> Path:
    """The folder of a split's files; unpacked into the output folder where there is only the tar."""
    plain = folder / "audio" / split
    tars = [folder / "audio" / f"{split}{suffix}" for suffix in (".tar.gz", ".tgz", ".tar")]
    archive = next((t for t in tars if t.is_file()), None)
    if plain.is_dir() or archive is None:
        return plain
    target = out / "audio" / folder.name / split
    if not target.is_dir():
        temporary = target.with_name(f"{split}.unpacking")
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.isfile() else None
                    if file is not None:  # names alone: nothing can be written elsewhere
                        (temporary / Path(member.name).name).write_bytes(file.read())
        except (tarfile.TarError, OSError, EOFError) as error:
            report.add(str(archive), f"damaged tar: {error}")
        temporary.rename(target)
    return target


def _ljspeech(source: Source, report: Report) -> Iterator[CorpusItem]:
    """metadata.csv (id|text|normalised text) and wavs/ID.wav"""
    for line in text_lines(source.path / "metadata.csv", source.encoding):
        columns = line.split("|")
        text = columns[-1] if len(columns) > 1 else None
        yield _item(source.path / "wavs" / f"{columns[0]}.wav", text, source.language or "en", "ljspeech", "ljspeech")


def _folder(source: Source, report: Report) -> Iterator[CorpusItem]:
    """Audio files anywhere below, each with a .txt of the same name beside it; the subfolder is the speaker."""
    for file in audio_files(source.path):
        folder = file.parent.relative_to(source.path).as_posix()
        below = None if folder == "." else folder
        if source.kind != "speech":
            yield _item(file, None, None, None, below or source.path.name)
            continue
        beside = file.with_suffix(".txt")
        text = "\n".join(text_lines(beside, source.encoding)) if beside.is_file() else None
        yield _item(file, text, source.language, below, source.path.name)


def _manifest(source: Source, report: Report) -> Iterator[CorpusItem]:
    """A manifest, a folder with one, or shards."""
    for u in read_manifest(source.path, report):
        text = _clean(u.text)
        yield CorpusItem(replace(u, text=text, language=u.language or source.language))


def _table(source: Source, report: Report) -> Iterator[CorpusItem]:
    """A CSV or TSV whose header names its columns (see COLUMNS), or without header: audio, text."""
    first = next(text_lines(source.path, source.encoding), "")
    delimiter = delimiter_of(source.path, first)
    header = [name.strip().strip('"').lower() for name in first.split(delimiter)]
    named = {key: next((n for n in names if n in header), None) for key, names in COLUMNS.items()}
    if named["audio"] is None:
        if Path(header[0]).suffix not in AUDIO_SUFFIXES:
            raise DataError(f"{source.path}: no column of audio files; name it one of {', '.join(COLUMNS['audio'])}")
        named = dict.fromkeys(COLUMNS) | {"audio": "0", "text": "1"}
        header = [str(k) for k in range(len(header))]
        rows = table_rows(source.path, delimiter, source.encoding, header)
    else:
        rows = table_rows(source.path, delimiter, source.encoding)
    for number, row in enumerate(rows, 1):
        cell = {key: (row.get(name) or "").strip() or None for key, name in named.items() if name}
        if not cell.get("audio"):
            report.add(f"{source.path}:{number}", "no audio in the row")
            continue
        try:
            start, end = (float(cell[k]) if cell.get(k) else None for k in ("start", "end"))  # type: ignore[arg-type]
        except ValueError:
            report.add(f"{source.path}:{number}", "start or end is not a number of seconds")
            continue
        split = SPLIT_NAMES.get(cell.get("split") or "", cell.get("split"))
        item = _item(
            source.path.parent / str(cell["audio"]),
            cell.get("text"),
            cell.get("language") or source.language,
            cell.get("speaker"),
            cell.get("source") or source.path.stem,
            split if split in SPLITS else None,
        )
        yield replace(item, utterance=replace(item.utterance, start=start, end=end))


def _lhotse(source: Source, report: Report) -> Iterator[CorpusItem]:
    """Cuts, or recordings and supervisions, as lhotse writes them; "lhotse:RECIPE": a release that lhotse can read."""
    recipe = source.format.partition(":")[2]
    for u, split in read_lhotse(source.path, recipe, source.out, report):
        yield CorpusItem(replace(u, text=_clean(u.text), language=u.language or source.language), split)


def _dataset(source: Source, report: Report) -> Iterator[CorpusItem]:
    """A dataset of Hugging Face's, saved on disk or by its name."""
    for row in read_dataset(source.name, source.out, report):
        names = {name.lower(): name for name in row.cells}
        cell = {key: next((row.cells[names[n]] for n in known if n in names), None) for key, known in COLUMNS.items()}
        text, speaker = (None if cell[key] is None else str(cell[key]) for key in ("text", "speaker"))
        language = cell["language"] if isinstance(cell["language"], str) else source.language
        yield _item(row.audio, text, language, speaker, Path(source.name).name, row.split)


SOURCE_FORMATS: dict[str, Callable[[Source, Report], Iterator[CorpusItem]]] = {
    "librispeech": _librispeech,
    "commonvoice": _common_voice,
    "fleurs": _fleurs,
    "ljspeech": _ljspeech,
    "folder": _folder,
    "table": _table,
    "manifest": _manifest,
    "lhotse": _lhotse,
    "datasets": _dataset,
}


def _item(
    audio: Path,
    text: str | None,
    language: str | None,
    speaker: str | None,
    source: str | None,
    split: str | None = None,
) -> CorpusItem:
    u = Utterance(os.path.abspath(audio), _clean(text), language=language, speaker=speaker, source=source)  # noqa: PTH100
    return CorpusItem(u, split)


def _clean(text: str | None) -> str | None:
    """One line, single spaces; None stays None (no text is not an empty text)."""
    return None if text is None else " ".join(text.split())
