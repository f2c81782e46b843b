"""What people have -> checked JSONL manifests: `dawhisper prepare SOURCE --out DIR`.

Reads releases of corpora, folders, tables, manifests and shards (releases.py), lhotse's cuts and Hugging Face's
datasets (corpora.py), and folders of noise or impulse responses. Every file is decoded once; what can't be used is
dropped and named in the report. Results of the checks are kept in the output folder, so that a stopped run goes on
where it was.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dawhisper.audio import SAMPLE_RATE, from_int16
from dawhisper.errors import DataError, OptionError
from dawhisper.files import json_lines, replacing, write_lines
from dawhisper.options import option

from .manifest import (
    MAX_SECONDS,
    MIN_SECONDS,
    SLACK_SECONDS,
    Report,
    Utterance,
    decode_audio,
    encode_audio,
    manifest_line,
    read_shard,
    write_manifest,
)
from .processes import in_processes
from .releases import SOURCE_FORMATS, SPLITS, CorpusItem, Source, detect_format

SHARD_CODECS = ("opus", "flac")
CHECKED, LABELLED, REPORT = ".checked.jsonl", ".labelled.jsonl", "report.json"
LOOPING = 2.4  # compression ratio of a repetitive text, Whisper's own threshold
ONLY_SPLIT = "manifest"  # the name of the one manifest where nothing is split


@dataclass(frozen=True)
class PrepareOptions:
    """What `dawhisper prepare` reads, checks and writes; `progress`: show bars."""

    source: str = option(help="folder, .jsonl, .tar, .csv or .tsv", positional=True, metavar="SOURCE")
    out: str = option(help="folder for the manifests", metavar="DIR")
    kind: str = option("speech", "what the recordings are", choices=["speech", "noise", "rir"])
    format: str | None = option(
        None,
        "librispeech, commonvoice, fleurs, ljspeech, folder, table, manifest, lhotse, lhotse:RECIPE (lhotse:ami) or "
        "datasets; found out by default",
    )
    language: str | None = option(None, "of the speech, where the source does not tell it")
    encoding: str | None = option(None, "of the texts; UTF-8, or what a byte order mark tells, by default")
    split: tuple[float, float, float] | None = option(
        None,
        "shares by speaker, 0.9 0.05 0.05 for speech; the release's own splits, if it has any, unless given",
        metavar=("TRAIN", "DEV", "TEST"),
    )
    untranscribed: bool = option(False, "keep speech without text, for label-free training", flag=True)
    min_seconds: float | None = option(None, "drop what is shorter (0.3; impulse responses 0.01)")
    max_seconds: float | None = option(None, "drop what is longer (30; noise and impulse responses an hour)")
    workers: int | None = option(None, "processes; as many as there are cores by default")
    shard: int = option(0, "pack N clips each into tar shards; 0 leaves the files alone", metavar="N")
    shard_codec: str = option("opus", "16 kHz mono; flac decodes 5x faster", choices=["opus", "flac"])
    shard_bitrate: int = option(32000, "of Opus, bits per second")
    label_with: str | None = option(None, "write what this Whisper hears as teacher_text", metavar="MODEL")
    device: str | None = option(None, "of that model: cuda or cpu; the best there is by default")
    batch_size: int = option(16, "of that model")
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", ("speech", "noise", "rir")),
            ("shard_codec", SHARD_CODECS),
        ):
            if getattr(self, name) not in known:
                choice = ", ".join(k for k in known if k)
                raise OptionError(f"{name} must be one of {choice}, not {getattr(self, name)!r}")
        form, _, recipe = (self.format or "manifest").partition(":")
        if form not in SOURCE_FORMATS or (recipe and form != "lhotse"):
            raise OptionError(f"format must be one of {', '.join(SOURCE_FORMATS)}, lhotse:RECIPE, not {self.format!r}")
        if self.split is not None and (len(self.split) != 3 or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6):
            raise OptionError(f"split must be three shares that add up to 1 (train, dev, test), not {self.split}")
        if self.shard < 0 or self.batch_size < 1 or (self.workers is not None and self.workers < 1):
            raise OptionError("shard must not be negative; batch_size and workers must be 1 or more")

    @property
    def limits(self) -> tuple[float, float]:
        """Shortest and longest allowed, in seconds."""
        low, high = {"speech": (MIN_SECONDS, MAX_SECONDS), "noise": (MIN_SECONDS, 3600.0), "rir": (0.01, 3600.0)}[
            self.kind
        ]
        return (
            low if self.min_seconds is None else self.min_seconds,
            high if self.max_seconds is None else self.max_seconds,
        )


@dataclass
class PrepareReport:
    """What `prepare` made. `dropped` iterates as (what, why) and has `counts`."""

    source: str
    format: str
    manifests: dict[str, str] = field(default_factory=dict)  # split -> file
    items: dict[str, int] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)
    speakers: dict[str, int] = field(default_factory=dict)
    dropped: Report = field(default_factory=Report)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.format})"]
        for split, path in self.manifests.items():
            who = f", {self.speakers[split]} speakers" if self.speakers[split] else ""
            lines.append(f"  {split}: {self.items[split]} clips, {self.hours[split]:.2f} h{who} -> {path}")
        lines.append(f"  dropped: {len(self.dropped)}")
        lines += [f"    {count:6d}  {why}" for why, count in self.dropped.counts.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in vars(self).items() if key != "dropped"}
        dropped = [{"what": what, "why": why} for what, why in self.dropped]
        return {**values, "counts": self.dropped.counts, "dropped": dropped}


def prepare(options: PrepareOptions) -> PrepareReport:
    """Check a source and write manifests (and shards) into `options.out`. Raises DataError when nothing is usable.

    Stopped with Ctrl-C or killed, it continues when it is run again: files checked, clips labelled and shards written
    are not done again unless they have changed.
    """
    source, out = Path(options.source), Path(options.out)
    if not source.exists() and options.format != "datasets":
        raise DataError(f"no such file or folder: {source}")
    form = options.format or detect_format(source)
    if options.kind != "speech" and form.partition(":")[0] not in ("manifest", "table", "lhotse", "datasets"):
        form = "folder"
    report = PrepareReport(str(source), form)
    read = Source(options.source, form, options.kind, options.language, options.encoding, out)
    listed = list(SOURCE_FORMATS[form.partition(":")[0]](read, report.dropped))
    out.mkdir(parents=True, exist_ok=True)
    items = _checked(_candidates(listed, options, report.dropped), options, report.dropped)
    if not items:
        _write_json(out / REPORT, report.to_dict())
        raise DataError(f"nothing usable in {source} as {form}: {report.dropped} (all of it in {out / REPORT})")
    if options.label_with:
        items = _labelled(items, options)
    for split, utterances in _split(items, options, form, report.notes).items():
        if options.shard:
            utterances = _write_shards(utterances, split, options, report.dropped)
        path = out / f"{split}.jsonl"
        write_manifest(path, utterances)
        report.manifests[split], report.items[split] = str(path), len(utterances)
        report.hours[split] = sum(u.duration for u in utterances) / 3600
        report.speakers[split] = len({u.speaker for u in utterances if u.speaker})
    _write_json(out / REPORT, report.to_dict())
    return report


# ---- checking -----------------------------------------------------------------------------------------------------


def _candidates(items: list[CorpusItem], options: PrepareOptions, report: Report) -> list[CorpusItem]:
    """What is worth decoding: with text where text is needed, and listed for the first time."""
    needs_text = options.kind == "speech" and not options.untranscribed
    with_text = [bool(i.utterance.text) for i in items]
    if needs_text and items and not any(with_text) and not options.label_with:
        raise DataError(f"no text for any of the {len(items)} clips in {options.source}: --untranscribed keeps them so")
    kept: dict[str, CorpusItem] = {}
    for item, has_text in zip(items, with_text):
        u = item.utterance
        if needs_text and not has_text and not (options.label_with and u.text is None):
            report.add(u.name, "empty text" if u.text is not None else "no text")
        elif u.name in kept:
            report.add(f"{u.name} (again)", "listed more than once")
        else:
            kept[u.name] = item
    return list(kept.values())


def _checked(items: list[CorpusItem], options: PrepareOptions, report: Report) -> list[CorpusItem]:
    """Decode everything that was not decoded before; keep what is sound and of a fit length."""
    path = Path(options.out) / CHECKED
    known = {line["key"]: line for line in json_lines(path)}
    keys = [_key(item.utterance) for item in items]
    todo = [(key, item.utterance) for key, item in zip(keys, items) if key not in known]
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(
            desc="checking", total=len(items), initial=len(items) - len(todo), unit="clip", disable=_quiet(options)
        ) as bar,
    ):
        results = in_processes(_check, [utterance for _, utterance in todo], options.workers)
        for (key, _), (seconds, why) in zip(todo, results):
            known[key] = {"key": key, "seconds": seconds, "why": why}
            file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
            file.flush()  # so that a killed run loses little
            bar.update()
    low, high = options.limits
    kept = []
    for key, item in zip(keys, items):
        seconds, why = known[key]["seconds"], known[key]["why"]
        if not why and seconds < low:
            why = f"shorter than {low:g} s: {seconds:.2f} s"
        if not why and seconds > high + SLACK_SECONDS:
            why = f"longer than {high:g} s: {seconds:.1f} s"
        if why:
            report.add(item.utterance.name, why)
        else:
            kept.append(replace(item, utterance=replace(item.utterance, duration=seconds)))
    return kept


def _key(u: Utterance) -> str:
    """Names a clip as it is now: a file that has changed is another one."""
    try:
        stat = os.stat(u.audio)  # noqa: PTH116
        state = f"{stat.st_size}.{stat.st_mtime_ns}"
    except OSError:
        state = "missing"
    return f"{u.name}|{state}"


def _check(u: Utterance) -> tuple[float, str]:
    """Decode a clip -> (seconds, why it can't be used or ""). A damaged file counts as unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            audio = decode_audio(u)
    except DataError as error:
        return 0.0, str(error)
    return round(len(audio) / SAMPLE_RATE, 4), ""


# ---- labelling ----------------------------------------------------------------------------------------------------


def _labelled(items: list[CorpusItem], options: PrepareOptions) -> list[CorpusItem]:
    """Add teacher_text: what a Whisper hears in the clean clips, greedily, many at a time."""
    path = Path(options.out) / LABELLED
    known = {line["key"]: line for line in json_lines(path) if line["model"] == options.label_with}
    keys = [_key(item.utterance) for item in items]
    todo = [(key, item.utterance) for key, item in zip(keys, items) if key not in known]
    if todo:
        with (
            path.open("a", encoding="utf-8") as file,
            tqdm(
                desc="labelling", total=len(items), initial=len(items) - len(todo), unit="clip", disable=_quiet(options)
            ) as bar,
        ):
            for batch in _transcripts(todo, options):
                for key, text, language in batch:
                    known[key] = {"key": key, "model": options.label_with, "text": text, "language": language}
                    file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
    return [
        replace(
            item,
            utterance=replace(item.utterance, teacher_text=known[key]["text"], teacher_language=known[key]["language"]),
        )
        for key, item in zip(keys, items)
    ]


def _transcripts(todo: list[tuple[str, Utterance]], options: PrepareOptions) -> Iterator[list[tuple[str, str, str]]]:
    """Batches of (key, text, language), clips of one language and of like length together."""
    import torch

    from dawhisper.checkpoint import load_model
    from dawhisper.decoding import DecodingOptions
    from dawhisper.window import decode_clips

    from .targets import whisper_language

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(str(options.label_with), device=device)
    groups: dict[str | None, list[tuple[str, Utterance]]] = defaultdict(list)
    for key, u in todo:
        language = whisper_language(u.language, model.num_languages) if model.is_multilingual else "en"
        groups[language].append((key, u))
    for group in groups.values():
        group.sort(key=lambda pair: -pair[1].duration)  # the longest first: memory runs out at once or never
    # decoded ahead in processes, so that the model need not wait
    sounds = in_processes(decode_audio, [u for group in groups.values() for _, u in group], options.workers)
    for language, group in groups.items():
        for batch in _chunks(group, options.batch_size):
            clips = [from_int16(sound) for sound in islice(sounds, len(batch))]
            results = decode_clips(model, clips, DecodingOptions(language=language, without_timestamps=True))
            # a text in a loop is no text: the clip is then learnt from without one
            yield [
                (key, "" if r.compression_ratio > LOOPING else r.text.strip(), r.language)
                for (key, _), r in zip(batch, results)
            ]


# ---- splitting ----------------------------------------------------------------------------------------------------


def _wanted_split(options: PrepareOptions, form: str) -> tuple[float, float, float] | None:
    """The shares asked for; by default speech is split 0.9/0.05/0.05, and noise and ready manifests are not."""
    if options.split is not None or options.kind != "speech" or form == "manifest":
        return options.split
    return 0.9, 0.05, 0.05


def _split(items: list[CorpusItem], options: PrepareOptions, form: str, notes: list[str]) -> dict[str, list[Utterance]]:
    """Items -> the manifests, by name: official splits where the release has them, otherwise by speaker."""
    shares = _wanted_split(options, form)
    if shares is None:
        return {ONLY_SPLIT: [item.utterance for item in items]}
    free = [item.utterance for item in items if item.split is None]
    official = {item.split for item in items if item.split}
    if official and options.split is None:
        notes.append(f"official splits kept: {', '.join(s for s in SPLITS if s in official)}")
        where = {u.name: "train" for u in free}  # of no official split: training material
    else:
        if official:
            free = [item.utterance for item in items]
            items = [replace(item, split=None) for item in items]
            notes.append("official splits replaced by the one asked for")
        where = assign_splits(free, shares)
        if len({u.speaker for u in free if u.speaker}) < 3:
            notes.append("fewer than three speakers known: split by clip, so that a voice may be in two splits")
    out: dict[str, list[Utterance]] = {name: [] for name in SPLITS}
    for item in items:
        out[item.split or where[item.utterance.name]].append(item.utterance)
    return {name: utterances for name, utterances in out.items() if utterances}


def assign_splits(utterances: Sequence[Utterance], shares: tuple[float, float, float]) -> dict[str, str]:
    """Utterance name -> split. All of a speaker (without three known speakers: of a recording) goes to one split.

    Speakers are taken in the order of a hash of their names until test and dev have their shares of the duration;
    one that would overfill a split by half is passed over. Depends on the material alone, not on its order.
    """
    by_speaker = len({u.speaker for u in utterances if u.speaker}) >= 3

    def group(u: Utterance) -> str:
        if by_speaker and u.speaker:
            return u.speaker
        return os.path.basename(u.audio) if u.offset is None else u.name  # noqa: PTH119

    seconds: dict[str, float] = defaultdict(float)
    for u in utterances:
        seconds[group(u)] += u.duration
    order = sorted(seconds, key=lambda name: blake2b(name.encode(), digest_size=8).digest())
    total, chosen = sum(seconds.values()), dict.fromkeys(order, "train")
    for split, share in (("test", shares[2]), ("dev", shares[1])):
        filled, target = 0.0, share * total
        for name in order:
            if chosen[name] == "train" and filled < target and filled + seconds[name] <= 1.5 * target:
                chosen[name] = split
                filled += seconds[name]
        left = [name for name in order if chosen[name] == "train"]
        if share > 0 and not filled and len(left) > 1:
            chosen[min(left, key=lambda name: seconds[name])] = split
    return {u.name: chosen[group(u)] for u in utterances}


# ---- shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardJob:
    path: Path
    utterances: list[Utterance]
    codec: str
    bitrate: int


def _write_shards(utterances: list[Utterance], split: str, options: PrepareOptions, report: Report) -> list[Utterance]:
    """Write SPLIT-00000.tar and so on, and SPLIT.shards.jsonl that lists them. -> the utterances in the shards"""
    out = Path(options.out)
    jobs = [
        _ShardJob(out / f"{split}-{k:05d}.tar", chunk, options.shard_codec, options.shard_bitrate)
        for k, chunk in enumerate(_chunks(utterances, options.shard))
    ]
    with tqdm(desc=f"shards of {split}", total=len(jobs), unit="shard", disable=_quiet(options)) as bar:
        for bad in in_processes(_write_shard, jobs, options.workers, chunk=1):
            for what, why in bad:
                report.add(what, why)
            bar.update()
    kept: list[Utterance] = []
    index = []
    for job in jobs:
        inside = read_shard(job.path, report)
        kept += inside
        seconds = round(sum(u.duration for u in inside), 2)
        index.append({"shard": job.path.name, "items": len(inside), "seconds": seconds})
    write_lines(out / f"{split}.shards.jsonl", (json.dumps(line) for line in index))
    return kept


def _write_shard(job: _ShardJob) -> list[tuple[str, str]]:
    """Encode and pack one shard, which is written whole or not at all. -> what could not be read"""
    made_of = _fingerprint(job)
    if _shard_fingerprint(job.path) == made_of:
        return []
    bad = []
    with replacing(job.path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, u in enumerate(job.utterances):
            try:
                audio = decode_audio(u)
            except DataError as error:
                bad.append((u.name, str(error)))
                continue
            line = json.loads(manifest_line(u, Path("/")))
            line = {key: v for key, v in line.items() if key not in ("audio", "start", "end", "offset", "size")}
            _add(tar, f"{number:06d}.{job.codec}", encode_audio(audio, job.codec, job.bitrate))
            _add(tar, f"{number:06d}.json", json.dumps(line, ensure_ascii=False).encode())
        _add(tar, "fingerprint", made_of.encode())  # last: a shard that has it is whole
    return bad


def _fingerprint(job: _ShardJob) -> str:
    parts = [job.codec, str(job.bitrate), *(json.dumps(asdict(u)) + _key(u) for u in job.utterances)]
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _shard_fingerprint(path: Path) -> str:
    """Of what a shard was made; empty when there is no whole shard."""
    try:
        with tarfile.open(path, "r:") as tar:
            file = tar.extractfile("fingerprint")
            return file.read().decode() if file else ""
    except (OSError, tarfile.TarError, KeyError, EOFError):
        return ""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# ---- files --------------------------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=1)])


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _quiet(options: PrepareOptions) -> bool | None:
    return None if options.progress else True  # None: only where there is a terminal
