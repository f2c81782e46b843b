"""Miniatures of what other packages write: shards of webdataset, manifests and recipes of lhotse, datasets on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sound import noise, write_wav

from dawhisper.cli import main
from dawhisper.data.corpora import split_named
from dawhisper.data.loader import Utterance, read_audio, read_manifest
from dawhisper.data.manifest import encode_audio
from dawhisper.data.prepare import PrepareOptions, PrepareReport, prepare
from dawhisper.data.releases import detect_format
from dawhisper.errors import DataError, OptionError

TEXTS = {"a": "one two", "b": "three", "c": "four five"}


@pytest.fixture
def clips(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "wavs").mkdir()
    return {name: write_wav(tmp_path / "wavs" / f"{name}.wav", noise(1 + i)) for i, name in enumerate(TEXTS)}


def run(source: Path | str, out: Path, **options: Any) -> PrepareReport:
    return prepare(PrepareOptions(str(source), str(out), workers=1, progress=False, **options))


def listed(report: PrepareReport) -> dict[str | None, Utterance]:
    return {u.text: u for path in report.manifests.values() for u in read_manifest(path)}


def test_names_of_splits() -> None:
    names = ("train-clean-100", "cuts_dev.jsonl.gz", "validation", "ami-eval", "test.other", "restrain", "all")
    assert [split_named(name) for name in names] == ["train", "dev", "dev", "test", "test", None, None]


# ---- webdataset


def test_webdataset_reads_our_shards(clips: dict[str, Path], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for name, text in TEXTS.items():
        clips[name].with_suffix(".txt").write_text(text)
    run(tmp_path / "wavs", tmp_path / "out", language="en", shard=2, split=(1.0, 0.0, 0.0), shard_codec="flac")
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(shards) == 2
    items = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert {item["json"]["text"] for item in items} == set(TEXTS.values())
    assert all(item["flac"][:4] == b"fLaC" and item["__key__"] for item in items)


def test_we_read_shards_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    sound = encode_audio((noise(3)[20000:36000] * 9000).astype(np.int16), "flac")
    with webdataset.TarWriter(str(tmp_path / "x-000000.tar")) as writer:
        values = {"transcript": "one two", "lang": "en", "start": 71.5, "speaker_id": 7}
        writer.write({"__key__": "sub/one.first", "flac": sound, "json": values})
        writer.write({"__key__": "sub/two", "flac": sound, "txt": "three\n", "cls": 5, "jpg": b"no picture"})
        writer.write({"__key__": "three", "audio.flac": sound, "txt": "four"})
        writer.write({"__key__": "mute", "flac": sound})
    report = run(tmp_path / "x-000000.tar", tmp_path / "out", language="en")
    found = listed(report)
    assert set(found) == {"one two", "three", "four"}
    assert (found["one two"].language, found["one two"].speaker, found["one two"].start) == ("en", "7", None)
    assert all(len(read_audio(u)) == 16000 for u in found.values())
    assert report.dropped.counts == {"no .json with its values or .txt beside it in the shard": 1}


# ---- lhotse


def test_lhotse(clips: dict[str, Path], tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    recordings = lhotse.RecordingSet.from_recordings(lhotse.Recording.from_file(path) for path in clips.values())
    spoken = [
        lhotse.SupervisionSegment(f"{name}-0", name, 0.0, 0.9, text=text, language="English", speaker=f"speaker-{name}")
        for name, text in TEXTS.items()
    ]
    spoken.append(lhotse.SupervisionSegment("c-1", "c", 1.5, 1.0, text="six", language="English", speaker="speaker-c"))
    supervisions = lhotse.SupervisionSet.from_segments(spoken)

    # recordings and supervisions, a folder of them: what was transcribed
    (tmp_path / "set").mkdir()
    recordings.to_file(tmp_path / "set" / "toy_recordings_dev.jsonl.gz")
    supervisions.to_file(tmp_path / "set" / "toy_supervisions_dev.jsonl.gz")
    report = run(tmp_path / "set", tmp_path / "out")
    assert report.format == "lhotse" and list(report.manifests) == ["dev"]
    found = listed(report)
    assert set(found) == {*TEXTS.values(), "six"}
    six = found["six"]
    assert (Path(six.audio).name, six.start, six.end, six.speaker) == ("c.wav", 1.5, 2.5, "speaker-c")
    assert len(read_audio(six)) == 16000

    # cuts, as they are: one of a whole file with two sentences, one resampled, which is written, one that is not there
    gone = lhotse.MonoCut("gone", 0, 1, 0, recording=lhotse.Recording.from_file(clips["a"], recording_id="gone"))
    gone.recording.sources[0].source = "nowhere.wav"
    whole = lhotse.CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    lhotse.CutSet.from_cuts(
        [
            *whole.subset(cut_ids=[cut.id for cut in whole if cut.recording_id == "c"]),
            *(cut.resample(8000) for cut in whole if cut.recording_id == "b"),
            gone,
        ]
    ).to_file(tmp_path / "cuts.jsonl")
    report = run(tmp_path / "cuts.jsonl", tmp_path / "out2", split=(1.0, 0.0, 0.0), untranscribed=True)
    found = listed(report)
    assert set(found) == {"four five six", "three"}
    joined = found["four five six"]
    assert joined.start is None and [(s.start, s.end, s.text) for s in joined.segments or ()] == [
        (0.0, 0.9, "four five"),
        (1.5, 2.5, "six"),
    ]
    assert found["three"].audio.endswith(".flac") and len(read_audio(found["three"])) == 32000
    assert report.dropped.counts == {"missing file": 1}


def test_cuts_whose_names_differ_in_one_sign_are_files_of_their_own(clips: dict[str, Path], tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    cuts = []
    for name, called in (("b", "x/1"), ("c", "x_1")):
        cut = lhotse.Recording.from_file(clips[name], recording_id=name).to_cut()
        cut.supervisions = [lhotse.SupervisionSegment(called, name, 0.0, 0.9, text=TEXTS[name], language="English")]
        cuts.append(cut.resample(8000).with_id(called))
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    found = listed(run(tmp_path / "cuts.jsonl", tmp_path / "out", split=(1.0, 0.0, 0.0)))
    one, two = found[TEXTS["b"]], found[TEXTS["c"]]
    assert one.audio != two.audio and not np.array_equal(read_audio(one), read_audio(two))


def test_a_recipe_of_lhotse(clips: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lhotse")
    rows = [f"{name}|{text}|{text}" for name, text in TEXTS.items()]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    found = listed(run(tmp_path, tmp_path / "out", format="lhotse:ljspeech", split=(1.0, 0.0, 0.0)))
    assert set(found) == set(TEXTS.values())
    assert all(Path(u.audio).parent == (tmp_path / "wavs").resolve() and u.start is None for u in found.values())
    (tmp_path / "cuts.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="lhotse can't read"):
        run(tmp_path / "cuts.jsonl.gz", tmp_path / "out")
    (tmp_path / "cuts.jsonl.gz").unlink()
    (tmp_path / "recordings.jsonl").write_text('{"audio": "wavs/a.wav"}')
    assert detect_format(tmp_path) == "ljspeech"  # a manifest of ours is none of lhotse's, whatever its name
    with pytest.raises(OptionError, match="no recipe 'nothing'"):
        run(tmp_path, tmp_path / "out", format="lhotse:nothing")
    with pytest.raises(DataError, match="recipe ami can't read"):
        run(tmp_path, tmp_path / "out", format="lhotse:ami")
    assert main(["prepare", str(tmp_path), "--out", str(tmp_path / "o"), "--format", "folder:x"]) == 1
    assert "lhotse:RECIPE, not 'folder:x'" in capsys.readouterr().err


# ---- datasets


def test_a_dataset_on_disk(clips: dict[str, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sounds = [{"bytes": None, "path": str(clips["a"])}, {"bytes": clips["b"].read_bytes(), "path": "b.wav"}, None]
    texts, speakers = ["one two", "three", "none"], [1, 2, 3]
    train = datasets.Dataset.from_dict(
        {"audio": sounds, "sentence": texts, "locale": ["en"] * 3, "client_id": speakers}
    )
    train = train.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": train, "validation": train.select([1])}).save_to_disk(tmp_path / "set")
    report = run(tmp_path / "set", tmp_path / "out")
    assert report.format == "datasets" and report.items == {"train": 2, "dev": 1}
    found = listed(report)
    assert (found["one two"].language, found["one two"].speaker) == ("en", "1")
    assert len(read_audio(found["one two"])) == 16000 and len(read_audio(found["three"])) == 32000
    assert report.dropped.counts == {"no audio in the row": 1}
    again = run(tmp_path / "set", tmp_path / "out")
    assert again.items == report.items
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="no column of audio, but text"):
        run(tmp_path / "text", tmp_path / "out")
    with pytest.raises(DataError, match="datasets can't load"):
        run(tmp_path / "gone", tmp_path / "out", format="datasets")
