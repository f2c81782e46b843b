"""Every layout that `prepare` reads, with sound and damaged files; splits, shards, and going on after a stop."""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dawhisper.cli import main
from dawhisper.data import prepare as module
from dawhisper.data.loader import Report, TargetOptions, Utterance, make_loader, read_audio, read_manifest
from dawhisper.data.prepare import PrepareOptions, PrepareReport, assign_splits, encode_audio, prepare
from dawhisper.data.processes import AHEAD, in_processes
from dawhisper.errors import DataError, OptionError

RATE = 16000


def write_wav(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(RATE * seconds)) / RATE
    samples = 0.3 * np.sin(2 * np.pi * (200 + 40 * seed) * time) + 0.02 * np.random.default_rng(seed).standard_normal(
        len(time)
    )
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def write_flac(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(RATE * seconds))
    path.write_bytes(encode_audio((samples * 32767).astype(np.int16), "flac"))
    return path


def run(source: Path, out: Path, **options: Any) -> PrepareReport:
    return prepare(PrepareOptions(str(source), str(out), workers=1, progress=False, **options))


def listed(report: PrepareReport) -> dict[str, list[Utterance]]:
    return {split: read_manifest(path) for split, path in report.manifests.items()}


def dropped(report: PrepareReport) -> dict[str, str]:
    return {Path(what).name: why.split(":")[0] for what, why in report.dropped}


def _touched(item: tuple[Path, int]) -> int:
    (item[0] / str(item[1])).touch()
    return item[1]


def test_processes_work_ahead_but_not_far(tmp_path: Path) -> None:
    results = in_processes(_touched, [(tmp_path, i) for i in range(100)], workers=2, chunk=4)
    assert next(results) == 0
    time.sleep(0.3)
    assert 4 <= len(list(tmp_path.iterdir())) <= (2 * AHEAD + 1) * 4
    assert list(results) == list(range(1, 100))


# ---- layouts ------------------------------------------------------------------------------------------------------


def test_librispeech(tmp_path: Path) -> None:
    for subset, speaker in (("train-clean-100", 19), ("train-clean-100", 26), ("dev-clean", 84), ("test-clean", 61)):
        folder = tmp_path / "LibriSpeech" / subset / str(speaker) / "198"
        for k in range(2):
            write_flac(folder / f"{speaker}-198-000{k}.flac", 1 + k, speaker)
        (folder / f"{speaker}-198.trans.txt").write_text(
            f"{speaker}-198-0000 NORTHANGER ABBEY\n{speaker}-198-0001 THIS LITTLE WORK\n{speaker}-198-0002 GONE\n"
        )
    report = run(tmp_path / "LibriSpeech", tmp_path / "out")
    splits = listed(report)
    assert report.format == "librispeech" and {k: len(v) for k, v in splits.items()} == {
        "train": 4,
        "dev": 2,
        "test": 2,
    }
    u = splits["dev"][0]
    assert (u.text, u.speaker, u.language, u.source) == ("NORTHANGER ABBEY", "libri-84", "en", "dev-clean")
    assert u.duration == pytest.approx(1.0) and len(read_audio(u)) == RATE
    assert report.dropped.counts == {"missing file": 4}
    assert report.speakers == {"train": 2, "dev": 1, "test": 1}


def test_common_voice(tmp_path: Path) -> None:
    root = tmp_path / "cv-corpus-17.0" / "az"
    columns = (  # of a real release
        "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\taccents\t"
        "variant\tlocale\tsegment\n"
    )
    rows = {
        "train": [("spk-a" * 9, "a1.mp3", 'Salam "dünya"')],
        "dev": [("spk-b" * 9, "b1.mp3", "Sabahınız xeyir.")],
        "test": [("spk-c" * 9, "c1.mp3", "Gecəniz xeyrə."), ("spk-c" * 9, "c2.mp3", "")],
        "validated": [
            ("spk-a" * 9, "a1.mp3", "Salam dünya"),
            ("spk-a" * 9, "a2.mp3", "Yenə salam."),
            ("spk-b" * 9, "b2.mp3", "Bu danışan sınaqdadır."),  # a speaker of dev: not into train
            ("spk-d" * 9, "d1.mp3", "Yeni səs."),
        ],
    }
    for name, lines in rows.items():
        (root / "clips").mkdir(parents=True, exist_ok=True)
        cells = (f"{a}\t{b}\t5f3e\t{c}\t\t2\t0\ttwenties\tfemale_feminine\t\t\taz\t\n" for a, b, c in lines)
        (root / f"{name}.tsv").write_text(columns + "".join(cells), "utf-8")
        for k, (_, path, _) in enumerate(lines):
            write_wav(root / "clips" / path, 1.0, k)  # ffmpeg looks at what is inside, not at the name
    for given in (root, tmp_path / "cv-corpus-17.0"):
        report = run(given, tmp_path / f"out-{given.name}")
        splits = listed(report)
        assert report.format == "commonvoice"
        assert {s: [Path(u.audio).stem for u in us] for s, us in splits.items()} == {
            "train": ["a1", "a2", "d1"],
            "dev": ["b1"],
            "test": ["c1"],
        }
        u = splits["train"][0]
        assert (u.text, u.language, u.source) == ('Salam "dünya"', "az", "commonvoice/az")
        assert dropped(report) == {"c2.mp3": "empty text"}


@pytest.mark.parametrize("packed", [False, True])
def test_fleurs(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "az_az"
    for split in ("train", "dev"):
        for k in range(2):
            write_wav(root / "audio" / split / f"{split}{k}.wav", 1.0, k)
        rows = [f"{k}\t{split}{k}.wav\tMətn {k}.\tmətn {k}\tm ə t n | {k} |\t16000\tFEMALE\n" for k in range(3)]
        (root / f"{split}.tsv").write_text("".join(rows), "utf-8")
        if packed:
            with tarfile.open(root / "audio" / f"{split}.tar.gz", "w:gz") as tar:
                tar.add(root / "audio" / split, split)
            for file in (root / "audio" / split).iterdir():
                file.unlink()
            (root / "audio" / split).rmdir()
    for _ in range(2):  # the second time nothing is unpacked again
        report = run(root, tmp_path / "out")
        splits = listed(report)
        assert report.format == "fleurs" and [len(splits[s]) for s in ("train", "dev")] == [2, 2]
        assert (splits["dev"][1].text, splits["dev"][1].language) == ("Mətn 1.", "az")
        assert dropped(report) == {"train2.wav": "missing file", "dev2.wav": "missing file"}


def test_ljspeech(tmp_path: Path) -> None:
    rows = [f"LJ001-{k:04d}|In 18{k}|In eighteen {k}" for k in range(30)]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    for k in range(29):
        write_wav(tmp_path / "wavs" / f"LJ001-{k:04d}.wav", 0.5, k)
    report = run(tmp_path, tmp_path / "out", split=(0.8, 0.1, 0.1))
    splits = listed(report)
    assert report.format == "ljspeech" and sum(report.items.values()) == 29
    assert splits["train"][0].text == "In eighteen 0" and min(report.items.values()) >= 2  # one speaker: split by clip
    assert dropped(report) == {"LJ001-0029.wav": "missing file"}
    assert any("fewer than three speakers" in note for note in report.notes)


def test_folder_with_texts_and_every_kind_of_bad_file(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    for k, speaker in enumerate("abcde"):
        for n in range(2):
            write_wav(source / speaker / f"{n}.wav", 1.0, k).with_suffix(".txt").write_text(f"  text\n {n} ")
    write_wav(source / "long.wav", 31).with_suffix(".txt").write_text("x")
    write_wav(source / "short.wav", 0.2).with_suffix(".txt").write_text("x")
    write_wav(source / "silent.wav", 1)
    with wave.open(str(source / "silent.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(bytes(32000))
    (source / "silent.txt").write_text("x")
    (source / "junk.mp3").write_bytes(os.urandom(3000))
    (source / "junk.txt").write_text("x")
    (source / "nothing.wav").write_bytes(b"")
    (source / "nothing.txt").write_text("x")
    whole = write_flac(source / "cut.flac", 5).read_bytes()
    (source / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (source / "cut.txt").write_text("x")
    write_wav(source / "blank.wav").with_suffix(".txt").write_text(" \n")
    write_wav(source / "textless.wav")
    (source / "notes.pdf").write_bytes(b"no audio")
    report = run(source, tmp_path / "out", language="en")
    assert report.format == "folder" and sum(report.items.values()) == 10
    utterances = [u for us in listed(report).values() for u in us]
    assert {u.speaker for u in utterances} == set("abcde") and utterances[0].text == "text 0"
    assert {u.language for u in utterances} == {"en"}
    why = dropped(report)
    assert why.pop("cut.flac") in ("does not decode", "cut off")
    assert why == {
        "long.wav": "longer than 30 s",
        "short.wav": "shorter than 0.3 s",
        "silent.wav": "silent",
        "junk.mp3": "does not decode",
        "nothing.wav": "does not decode",
        "blank.wav": "empty text",
        "textless.wav": "no text",
    }
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["counts"] == report.dropped.counts and len(saved["dropped"]) == len(report.dropped)
    assert "dropped: 8" in str(report) and "1  longer than 30 s" in str(report)
    kept = run(source, tmp_path / "out2", untranscribed=True, max_seconds=60)
    assert sum(kept.items.values()) == 13  # long, blank and textless ones too


def test_tables(tmp_path: Path) -> None:
    for k in range(4):
        write_wav(tmp_path / "audio" / f"{k}.wav", 3.0, k)
    (tmp_path / "a.csv").write_text(
        "Path,sentence,locale,split\n"
        'audio/0.wav,"Hello, you",en,train\naudio/1.wav,Bye,en,validation\naudio/2.wav,Oh,en,\n,nothing,en,\n'
    )
    report = run(tmp_path / "a.csv", tmp_path / "out")
    assert {s: [u.text for u in us] for s, us in listed(report).items()} == {
        "train": ["Hello, you", "Oh"],
        "dev": ["Bye"],
    }
    assert report.dropped.counts == {"no audio in the row": 1}
    (tmp_path / "b.tsv").write_text(
        "audio\ttext\tstart\tend\naudio/0.wav\tone\t0\t1\naudio/0.wav\ttwo\t1\t2.5\naudio/0.wav\tx\tsoon\t2\n"
        "audio/0.wav\tagain\t1\t2.5\naudio/1.wav\tbeyond\t5\t6\n"
    )
    report = run(tmp_path / "b.tsv", tmp_path / "out2", split=(1.0, 0.0, 0.0))
    one, two = listed(report)["train"]
    assert (one.start, one.end, two.duration) == (0.0, 1.0, pytest.approx(1.5))
    assert set(report.dropped.counts) == {
        "start or end is not a number of seconds",
        "listed more than once",
        "does not decode",
    }
    (tmp_path / "c.csv").write_text("audio/0.wav;eins\naudio/1.wav;zwei\n")
    report = run(tmp_path / "c.csv", tmp_path / "out3", split=(1.0, 0.0, 0.0), language="de")
    assert [u.text for u in listed(report)["train"]] == ["eins", "zwei"]
    (tmp_path / "d.csv").write_text("name,words\nx,y\n")
    with pytest.raises(DataError, match="no column of audio files"):
        run(tmp_path / "d.csv", tmp_path / "out4")


def test_noise_and_rir_folders(tmp_path: Path) -> None:
    write_wav(tmp_path / "n" / "rain" / "1.wav", 35)
    write_wav(tmp_path / "n" / "rain" / "2.wav", 0.1)
    report = run(tmp_path / "n", tmp_path / "out", kind="noise")
    (noise,) = listed(report)["manifest"]
    assert (noise.text, noise.source, noise.duration) == (None, "rain", 35.0)
    assert dropped(report) == {"2.wav": "shorter than 0.3 s"}
    assert run(tmp_path / "n", tmp_path / "out2", kind="rir").items == {"manifest": 2}


def test_manifest_and_relative_paths(tmp_path: Path) -> None:
    write_wav(tmp_path / "data" / "a.wav")
    manifest = tmp_path / "data" / "manifest.jsonl"
    manifest.write_text('{"audio": "a.wav", "duration": 9, "text": "a", "speaker": "s"}\nrubbish\n')
    report = run(tmp_path / "data", tmp_path / "out")
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line == {"audio": "../data/a.wav", "text": "a", "duration": 1.0, "speaker": "s"}
    assert report.dropped.counts == {"not a manifest line": 1}
    (tmp_path / "data").rename(tmp_path / "moved-data")
    (tmp_path / "new").mkdir()
    (tmp_path / "moved-data").rename(tmp_path / "new" / "data")
    (tmp_path / "out").rename(tmp_path / "new" / "out")  # both together
    assert len(read_audio(read_manifest(tmp_path / "new" / "out")[0])) == RATE


def test_nothing_usable_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        run(tmp_path / "no", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing usable"):
        run(tmp_path / "empty", tmp_path / "out")
    write_wav(tmp_path / "plain" / "a.wav")
    with pytest.raises(DataError, match="--untranscribed"):
        run(tmp_path / "plain", tmp_path / "out")
    write_wav(tmp_path / "bad" / "a.wav", 0.1).with_suffix(".txt").write_text("x")
    with pytest.raises(DataError, match="1 shorter than"):
        run(tmp_path / "bad", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["counts"] == {"shorter than 0.3 s": 1}
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match="neither a folder"):
        run(tmp_path / "x.txt", tmp_path / "out")
    for wrong in ({"kind": "music"}, {"format": "timit"}, {"split": (0.5, 0.1, 0.1)}, {"shard": -1}):
        with pytest.raises(OptionError):
            PrepareOptions("a", "b", **wrong)  # type: ignore[arg-type]


# ---- splits -------------------------------------------------------------------------------------------------------


def test_speakers_are_in_one_split_and_shares_are_near() -> None:
    rng = np.random.default_rng(0)
    utterances = [Utterance(f"{k}.wav", "x", float(rng.uniform(1, 9)), speaker=f"s{k % 97}") for k in range(2000)]
    where = assign_splits(utterances, (0.8, 0.1, 0.1))
    by_speaker: dict[str | None, set[str]] = {}
    seconds = dict.fromkeys(("train", "dev", "test"), 0.0)
    for u in utterances:
        by_speaker.setdefault(u.speaker, set()).add(where[u.name])
        seconds[where[u.name]] += u.duration
    assert all(len(splits) == 1 for splits in by_speaker.values())
    total = sum(seconds.values())
    assert [seconds[s] / total for s in ("train", "dev", "test")] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert assign_splits(utterances[::-1], (0.8, 0.1, 0.1)) == where
    few = [Utterance(f"{k}.wav", "x", 5.0, speaker=f"s{k % 3}") for k in range(30)]
    assert set(assign_splits(few, (0.9, 0.05, 0.05)).values()) == {"train", "dev", "test"}


def test_official_splits_give_way_to_an_asked_one(tmp_path: Path) -> None:
    for k in range(20):
        write_wav(tmp_path / f"{k}.wav", 0.5, k)
    (tmp_path / "t.csv").write_text("audio,text,split\n" + "".join(f"{k}.wav,x,test\n" for k in range(20)))
    assert run(tmp_path / "t.csv", tmp_path / "a").items == {"test": 20}
    assert set(run(tmp_path / "t.csv", tmp_path / "b", split=(0.8, 0.1, 0.1)).items) == {"train", "dev", "test"}


# ---- shards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    """A manifest of seven clips; two of them parts of one file."""
    folder = tmp_path / "seven"
    lines: list[dict[str, Any]] = []
    for k in range(5):
        write_wav(folder / f"{k}.wav", 0.5 + 0.3 * k, k)
        lines.append(
            {"audio": f"{k}.wav", "text": f"mətn {k}", "language": "az", "speaker": "s", "duration": 0.5 + 0.3 * k}
        )
    write_wav(folder / "both.wav", 3, 9)
    lines += [
        {"audio": "both.wav", "text": str(k), "start": 1.5 * k, "end": 1.5 * k + 1.5, "duration": 1.5} for k in (0, 1)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_flac_shards_hold_exactly_what_the_manifest_has(seven: Path, tmp_path: Path) -> None:
    report = run(seven, tmp_path / "out", shard=3, shard_codec="flac")
    plain = read_manifest(seven)
    assert sorted(f.name for f in (tmp_path / "out").glob("*.tar")) == [f"manifest-0000{k}.tar" for k in range(3)]
    for source in ("out/manifest.jsonl", "out", "out/manifest.shards.jsonl"):
        inside = read_manifest(tmp_path / source)
        for a, b in zip(plain, inside, strict=True):
            assert np.array_equal(read_audio(a), read_audio(b))
            assert (a.text, a.language, a.speaker, a.duration) == (b.text, b.language, b.speaker, b.duration)
    assert len(read_manifest(tmp_path / "out" / "manifest-00001.tar")) == 3
    assert report.items == {"manifest": 7}
    runs = []
    for source in (seven, tmp_path / "out"):  # a loader reads both alike
        loader = make_loader(source, TargetOptions(), 3, workers=0)
        runs.append([batch for batch, _ in zip(loader, range(4))])
    for a, b in zip(*runs):
        assert a.audio.equal(b.audio) and a.tokens.equal(b.tokens)


def test_opus_shards_are_close_and_as_long(seven: Path, tmp_path: Path) -> None:
    run(seven, tmp_path / "out", shard=100)
    for a, b in zip(read_manifest(seven), read_manifest(tmp_path / "out"), strict=True):
        x, y = read_audio(a).astype(float), read_audio(b).astype(float)
        assert 0 <= len(y) - len(x) <= 160  # the codec may pad by some milliseconds
        assert np.corrcoef(x, y[: len(x)])[0, 1] > 0.95
    assert (tmp_path / "out" / "manifest-00000.tar").stat().st_size < 70_000


def test_whole_shards_are_kept_and_damaged_ones_made_again(seven: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(seven, out, shard=3)
    first = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob("*.tar")}
    cut = out / "manifest-00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    report = Report()
    assert len(read_manifest(out / "manifest.shards.jsonl", report)) < 7 and "damaged shard" in str(report)
    run(seven, out, shard=3)
    again = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob("*.tar")}
    assert {name: data for name, (data, _) in again.items()} == {name: data for name, (data, _) in first.items()}
    assert [name for name in first if first[name][1] != again[name][1]] == ["manifest-00001.tar"]
    assert not list(out.glob(".manifest*"))


# ---- going on -----------------------------------------------------------------------------------------------------


def test_a_second_run_decodes_only_what_is_new_or_changed(
    seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = module.decode_audio

    def count(u: Utterance) -> np.ndarray:
        decoded.append(u.name)
        return real(u)

    monkeypatch.setattr(module, "decode_audio", count)
    first = run(seven, tmp_path / "out")
    assert len(decoded) == 7
    lines = (tmp_path / "out" / "manifest.jsonl").read_text()
    checked = tmp_path / "out" / ".checked.jsonl"
    kept = checked.read_text().splitlines()[:4]
    checked.write_text("\n".join(kept) + '\n{"key": "half a li')  # killed while it wrote the fifth
    decoded.clear()
    run(seven, tmp_path / "out")
    assert len(decoded) == 3
    decoded.clear()
    write_wav(seven / "0.wav", 2.0)
    report = run(seven, tmp_path / "out")
    assert len(decoded) <= 2 and report.items == first.items
    assert (tmp_path / "out" / "manifest.jsonl").read_text() != lines
    decoded.clear()
    run(seven, tmp_path / "out")
    assert decoded == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for k in range(300):
        write_wav(source / f"{k}.wav", 2.0, k)
    code = (
        "from dawhisper.data.prepare import *\n"
        "if __name__ == '__main__':\n"
        f"    prepare(PrepareOptions({str(source)!r}, {str(out)!r}, untranscribed=True, workers=2, progress=False))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    root = str(Path(__file__).resolve().parent.parent.parent)
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root}, stderr=-3)
    checked = out / ".checked.jsonl"
    until = time.time() + 60
    while not (checked.is_file() and checked.stat().st_size) and time.time() < until:
        time.sleep(0.005)
    process.send_signal(how)
    process.wait(30)
    until = time.time() + 20
    while running(script) and time.time() < until:
        time.sleep(0.1)
    assert not running(script)  # no worker is left behind
    before = len(checked.read_text().splitlines())
    assert before > 0
    report = run(source, out, untranscribed=True)
    assert sum(report.items.values()) == 300
    keys = [json.loads(line)["key"] for line in checked.read_text().splitlines() if line.endswith("}")]
    assert len(set(keys)) >= 299
    assert len(keys) <= 301  # nothing of what was done is done again


def running(script: Path) -> list[str]:
    """Processes that were started with this script, where the system tells (Linux)."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(script) in command:
            found.append(command)
    return found


def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    for k in range(40):
        write_wav(tmp_path / "in" / f"{k % 4}" / f"{k}.wav", 0.2 + 0.02 * k, k).with_suffix(".txt").write_text("x")
    one = run(tmp_path / "in", tmp_path / "one")
    options = PrepareOptions(str(tmp_path / "in"), str(tmp_path / "two"), workers=2, progress=False)
    two = prepare(options)
    assert listed(one) == listed(two) and list(one.dropped) == list(two.dropped)


# ---- labelling ----------------------------------------------------------------------------------------------------


def test_label_with_writes_the_teachers_text(tiny_en_path: Path, assets: Path, tmp_path: Path) -> None:
    clips = sorted(f for f in assets.rglob("*") if f.suffix in (".flac", ".opus", ".wav", ".mp3"))[:3]
    if not clips:
        pytest.skip("no clips in assets")
    lines = [json.dumps({"audio": str(clip), "language": "en"}) for clip in clips]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    for _ in range(2):
        report = run(tmp_path / "m.jsonl", tmp_path / "out", label_with=str(tiny_en_path), device="cpu")
    utterances = listed(report)["manifest"]
    assert len(utterances) == len(clips)
    assert all(u.teacher_text is not None and u.teacher_language == "en" for u in utterances)
    assert any(u.teacher_text for u in utterances)
    assert len((tmp_path / "out" / ".labelled.jsonl").read_text().splitlines()) == len(clips)


# ---- encodings


def write_table(folder: Path, encoding: str, text: str = "café à la crème", mark: bytes = b"") -> Path:
    write_pcm(folder / "b.wav", encoding)
    path = folder / "table.csv"
    path.write_bytes(mark + f"path,text,language\nb.wav,{text},fr\n".encode(encoding))
    return path


def write_pcm(path: Path, seed: str) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        noise = np.random.default_rng(len(seed)).integers(-3000, 3000, 16000)
        file.writeframes(noise.astype("<i2").tobytes())


@pytest.mark.parametrize(
    ("encoding", "mark", "given"),
    [
        ("utf-8", b"", None),
        ("utf-8-sig", b"", None),
        ("utf-16", b"", None),  # python writes the mark
        ("utf-16-be", codecs.BOM_UTF16_BE, None),
        ("utf-32", b"", None),
        ("cp1252", b"", "cp1252"),
        ("utf-16-le", b"", "utf-16-le"),
    ],
)
def test_texts_in_their_encoding(encoding: str, mark: bytes, given: str | None, tmp_path: Path) -> None:
    table = write_table(tmp_path, encoding, mark=mark)
    prepare(PrepareOptions(str(table), str(tmp_path / "out"), encoding=given, workers=1, progress=False))
    lines = [line for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    assert any(json.loads(line).get("text") == "café à la crème" for line in lines)


def test_what_is_not_utf8_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, "cp1252")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_pcm(folder / "a.wav", "x")
    (folder / "a.txt").write_bytes("one\nzwölf".encode("latin-1"))
    for source, line in ((table, "table.csv:2"), (folder, "a.txt:2")):
        assert main(["prepare", str(source), "--out", str(tmp_path / "o"), "--workers", "1"]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert line in error and "not UTF-8" in error and "--encoding" in error
    assert main(["prepare", str(table), "--out", str(tmp_path / "o"), "--encoding", "klingon"]) == 1
    assert "klingon" in capsys.readouterr().err
