"""`dawhisper join`: whose clips become one window, where each lies in it, and the time stamps that targets have."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from dawhisper.cli import main
from dawhisper.data.join import JoinOptions, join_clips, plan_windows
from dawhisper.data.loader import make_loader
from dawhisper.data.manifest import Report, Utterance, read_audio, read_manifest
from dawhisper.data.targets import TargetOptions, Targets
from dawhisper.errors import OptionError

SECONDS = (1.5, 2.25, 3.0, 1.2, 2.0)


def write_clip(path: Path, seconds: float, seed: int) -> None:
    samples = np.random.default_rng(seed).integers(1, 1000, int(seconds * 16000)).astype("<i2")  # never silent
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of twenty clips of two speakers, in turn."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i in range(20):
        seconds = SECONDS[i % len(SECONDS)]
        write_clip(folder / f"{i}.wav", seconds, i)
        line = {"audio": f"{i}.wav", "duration": seconds, "text": f"This is {i}.", "language": "en"}
        lines.append(line | {"speaker": "ab"[i % 2], "source": "here", "teacher_text": f"That is {i}."})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return folder / "manifest.jsonl"


def options(clips: Path, out: Path, **more: object) -> JoinOptions:
    return JoinOptions([str(clips)], str(out), **{"seconds": (4.0, 9.0), **more})  # type: ignore[arg-type]


def test_windows_are_of_one_speaker_and_hold_a_clip_once(clips: Path, tmp_path: Path) -> None:
    wanted = options(clips, tmp_path)
    windows = list(plan_windows(read_manifest(clips), wanted))
    used = [u.audio for window in windows for u, _ in window]
    assert len(used) == len(set(used)) >= 14
    for window in windows:
        assert len(window) > 1
        assert len({u.speaker for u, _ in window}) == 1
        assert window[0][1] == 0.0 and all(0.1 <= pause <= 0.8 for _, pause in window[1:])
        assert 4.0 <= sum(u.duration + pause for u, pause in window) <= 9.0
    again = list(plan_windows(read_manifest(clips), wanted))
    assert again == windows != list(plan_windows(read_manifest(clips), options(clips, tmp_path, seed=1)))
    mute = [Utterance(f"{i}.wav", duration=2.0, speaker="a") for i in range(9)]  # nothing known of what they say
    assert not list(plan_windows(mute, wanted))


def test_a_window_sounds_as_its_segments_say(clips: Path, tmp_path: Path) -> None:
    said = join_clips(options(clips, tmp_path))
    windows = read_manifest(tmp_path)
    assert f"{len(windows)} windows of {sum(len(u.segments or ()) for u in windows)} clips" in said
    sound = {u.text: read_audio(u) for u in read_manifest(clips)}
    for window in windows:
        audio = read_audio(window)
        assert abs(len(audio) - window.duration * 16000) <= 1
        assert window.segments is not None
        covered = np.zeros(len(audio), bool)
        for segment in window.segments:
            start = round(segment.start * 16000)
            places = [p for p in range(start - 16, start + 17) if p >= 0]  # times are kept to a millisecond
            clip = sound[segment.text]
            at = next(p for p in places if np.array_equal(audio[p : p + len(clip)], clip))
            covered[at : at + len(clip)] = True
            assert abs((at + len(clip)) / 16000 - segment.end) <= 0.001
        assert not audio[~covered].any()
        assert window.text == " ".join(str(s.text) for s in window.segments)
        assert window.teacher_text == " ".join(str(s.teacher_text) for s in window.segments)


def test_durations_that_are_left_out_and_the_longest_window(clips: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in clips.read_text("utf-8").splitlines()]
    (clips.parent / "bare.jsonl").write_text("\n".join(json.dumps(x | {"duration": 0}) for x in lines), "utf-8")
    for name, source in (("bare", clips.parent / "bare.jsonl"), ("whole", clips)):
        join_clips(options(source, tmp_path / name))
    bare, whole = (read_manifest(tmp_path / name) for name in ("bare", "whole"))
    assert [u.segments for u in bare] == [u.segments for u in whole]
    lines = []
    for speaker, seconds in (("c", 15.02), ("d", 16.0)):  # a codec's padding is cut off; what is wrong is left out
        write_clip(clips.parent / f"{speaker}.wav", seconds, 99)
        lines += [{"audio": f"{speaker}.wav", "duration": 15.0, "text": "Long.", "speaker": speaker}] * 2
    (clips.parent / "long.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    said = join_clips(options(clips.parent / "long.jsonl", tmp_path / "long", seconds=(29.0, 30.0), pause=(0.0, 0.0)))
    assert "1 longer than its manifest says" in said
    [window] = read_manifest(tmp_path / "long")
    assert (window.speaker, window.duration) == ("c", 30.0)
    assert window.segments is not None and window.segments[-1].end == 30.0


def test_targets_have_a_stamp_at_each_border(clips: Path, tmp_path: Path) -> None:
    join_clips(options(clips, tmp_path))
    u = read_manifest(tmp_path)[0]
    assert u.segments
    for labels, key in (("text", "text"), ("teacher", "teacher_text")):
        targets = Targets(TargetOptions(timestamps=1.0, prompt=0.0, labels=labels))
        target = targets(u, round(u.duration * 16000), np.random.default_rng(0))
        first = targets.tokenizer.timestamp_begin
        expected = []
        for segment in u.segments:
            text = targets.encode(getattr(segment, key), "en")
            expected += [first + round(50 * segment.start), *text, first + round(50 * segment.end)]
        assert target.tokens[target.begin :] == expected
        assert target.labels[target.begin :] == [*expected[1:], targets.tokenizer.eot]
        plain = Targets(TargetOptions(timestamps=0.0, prompt=0.0, labels=labels))
        target = plain(u, round(u.duration * 16000), np.random.default_rng(0))
        assert target.tokens[target.begin + 1 :] == plain.encode(getattr(u, key), "en")


def test_another_speed_moves_all_stamps(clips: Path, tmp_path: Path) -> None:
    join_clips(options(clips, tmp_path))
    batch = next(iter(make_loader(tmp_path, TargetOptions(timestamps=1.0), 4, workers=0)))
    first = batch.timestamp_begin
    faster = batch.retimed((batch.lengths / 1.25).long())
    stamps, moved = (x.labels[x.labels > first] - first for x in (batch, faster))
    assert len(stamps) > 4 + len(batch.lengths)  # more than the last of each
    assert ((moved - stamps / 1.25).abs() <= 1).all()
    assert torch.equal(batch.retimed(batch.lengths).labels, batch.labels)


@pytest.mark.parametrize(
    "segments",
    [
        [{"start": 2.0, "end": 1.0, "text": "Yes."}],
        [{"start": 0.0, "end": 31.0, "text": "Yes."}],
        [{"start": 0.0, "end": 2.0, "text": "Yes."}, {"start": 1.0, "end": 3.0, "text": "No."}],
        [{"start": "soon", "end": 1.0}],
        [{"start": 0.0, "end": 1.0, "words": "Yes."}],
        [{"end": 1.0}],
        [{"start": 0.0, "end": float("nan")}],
        ["Yes."],
        5,
    ],
)
def test_impossible_segments_are_named(segments: object, tmp_path: Path) -> None:
    good = {"audio": "a.wav", "duration": 3.0, "text": "Yes."}
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps(good) + "\n" + json.dumps(good | {"segments": segments}), "utf-8"
    )
    report = Report()
    assert len(read_manifest(tmp_path, report)) == 1
    [(what, why)] = report
    assert what.endswith(":2") and why.startswith("not a manifest line")


def test_bad_clips_and_options(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in clips.read_text("utf-8").splitlines()]
    lines[0]["audio"] = "gone.wav"
    bad = clips.parent / "bad.jsonl"
    bad.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    said = join_clips(options(bad, tmp_path / "out"))
    assert "1 skipped" in said
    whole = join_clips(options(clips, tmp_path / "whole"))
    count = [int(text.split(" windows")[0].split()[-1]) for text in (said, whole)]
    assert count[0] == count[1] - 1
    with pytest.raises(OptionError, match="--seconds is two numbers from 0 to 30"):
        options(clips, tmp_path, seconds=(5.0, 40.0))
    assert main(["join", str(clips), "--out", str(tmp_path / "none"), "--seconds", "25", "29"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing to join; lower --seconds" in error
