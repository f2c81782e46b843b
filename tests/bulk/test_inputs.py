"""What is named becomes recordings, each once, with outputs that no other has."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dawhisper.bulk.inputs import Content, Input, alike, find_inputs, with_outputs
from dawhisper.errors import DataError, OptionError
from dawhisper.transcription import Settings


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def outputs(*named: object, recursive: bool = False) -> dict[str, str]:
    """The name of each recording's outputs, by what it is called."""
    return {Path(each.label).name: each.output for each in find_inputs([str(n) for n in named], recursive)}


def names(paths: list[str]) -> list[str]:
    return [each.output for each in with_outputs([Input(path) for path in paths])]


def test_a_folder_and_those_below(tmp_path: Path) -> None:
    root = touch(tmp_path / "in", "b.wav", "a.MP3", "notes.txt", "._a.mp3", "sub/c.mkv", "sub/deep/b.wav")
    assert outputs(root) == {"a.MP3": "a", "b.wav": "b"}
    assert [each.output for each in find_inputs([str(root)], True)] == ["a", "b", "sub/c", "sub/deep/b"]
    other = touch(tmp_path / "other", "sub/c.wav")
    both = [each.output for each in find_inputs([str(root), str(other)], True)]
    assert both == ["in/a", "in/b", "in/sub/c", "in/sub/deep/b", "other/sub/c"]
    with pytest.raises(OptionError, match="--recursive"):
        find_inputs([str(other)])


def test_globs(tmp_path: Path) -> None:
    touch(tmp_path, "a1.wav", "a2.flac", "a3.txt", "a4.dat", "deep/a5.wav")
    assert outputs(tmp_path / "a*") == {"a1.wav": "a1", "a2.flac": "a2"}
    assert outputs(tmp_path / "*.dat") == {"a4.dat": "a4"}
    assert set(outputs(tmp_path / "**" / "*.wav")) == {"a1.wav", "a5.wav"}
    touch(tmp_path, "[odd].wav")
    assert outputs(tmp_path / "[odd].wav") == {"[odd].wav": "[odd]"}  # a file that is there is no glob
    with pytest.raises(OptionError, match="matches"):
        find_inputs([str(tmp_path / "z*.wav")])


def test_manifests_and_lists(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    rows = [
        {"audio": "a.wav", "language": "German", "task": "translate", "prompt": "Szeged", "name": "one/first"},
        {"path": str(tmp_path / "b.wav"), "start": 1.5, "end": 3},
        {"audio": "https://example.org/talks/c%20d.mp3?key=1.2"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second, third = find_inputs([str(manifest)])
    assert first == Input(str(tmp_path / "a.wav"), "one/first", settings=Settings("de", "translate", "Szeged"))
    assert (second.output, second.settings) == ("b", Settings(clip_timestamps="1.5,3"))
    assert (third.source, third.output) == (rows[2]["audio"], "c d")
    table = tmp_path / "m.csv"
    table.write_text('path;language;prompt\na.wav;;\nb.wav;fr;"one; two"\n')
    settings = [each.settings for each in find_inputs([str(table)])]
    assert settings == [Settings(), Settings("fr", initial_prompt="one; two")]
    (tmp_path / "list.txt").write_text("a.wav\n\nhttp://example.org/x.ogg\nnowhere.wav\n")
    listed = [each.source for each in find_inputs([str(tmp_path / "list.txt")])]
    assert listed == [str(tmp_path / "a.wav"), "http://example.org/x.ogg", str(tmp_path / "nowhere.wav")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "m.jsonl:1: not a line of JSON"),
        ('["a.wav"]', "m.jsonl:1: a line is"),
        ('{"sound": "a.wav"}', "row 1 names no recording"),
        ('{"audio": "a.wav", "language": "germn"}', "did you mean german"),
        ('{"audio": "a.wav", "task": "sing"}', "row 1: unknown task 'sing'"),
        ('{"audio": "a.wav", "prompt": 5}', "row 1: a prompt is text"),
        ('{"audio": "a.wav", "start": "soon"}', "row 1: clip_timestamps"),
        ('{"audio": "a.wav", "name": "../../etc/x"}', "leads out of the output folder"),
        ('{"audio": "a.wav", "name": "/etc/x"}', "leads out of the output folder"),
        ('{"audio": "a.tar", "offset": 512, "size": 9}', "points into a shard"),
        ('{"audio": "a.wav", "name": "x"}\n{"audio": "b.wav", "name": "X"}', "more than one recording, such as 'x'"),
    ],
)
def test_a_bad_manifest_is_one_line(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as error:
        find_inputs([str(tmp_path / "m.jsonl")])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"RIFF")))
    (piped,) = find_inputs(["-"])
    assert isinstance(piped.source, Content) and piped.source.read() == b"RIFF"
    assert (piped.label, piped.output) == ("standard input", "stdin")


def test_named_twice_is_done_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    with pytest.warns(UserWarning, match=r"1 recording\(s\) are named more than once"):
        found = find_inputs([str(tmp_path), str(tmp_path / "a.wav")])
    assert [each.output for each in found] == ["a", "b"]
    assert [each.source for each in find_inputs([""])] == [""]  # which fails, and is not the folder where we are


def test_names_never_collide_on_any_disk() -> None:
    for paths in (
        ["Talk.wav", "talk.WAV", "TALK.mp3"],
        ["caf\u00e9.wav", "cafe\u0301.wav"],
        ["a/x.wav", "b/x.wav", "a/x_2.wav", "x.wav", "x.wav"],
        ["x.wav", "x.wav", "x_2.wav"],
        ["x.mp3", "x.wav", "x.mp3.wav"],
        ["stra\u00dfe.wav", "STRASSE.wav"],
    ):
        with pytest.warns(UserWarning, match="share a name"):
            assert len({alike(name) for name in names(paths)}) == len(paths)
    assert names(["a/x.wav", "b/y.mp3"]) == ["x", "y"]
    with pytest.warns(UserWarning, match=r"2 recordings share a name; their outputs are called x.wav, x.mp3"):
        assert names(["x.wav", "x.mp3"]) == ["x.wav", "x.mp3"]
    with pytest.warns(UserWarning):
        assert names(["/a/x.wav", "/b/x.wav"]) == ["a_x.wav", "b_x.wav"]
    with pytest.warns(UserWarning):  # a name that a manifest gives is kept, whatever else wants it
        made = with_outputs([Input("x.wav"), Input("other.wav", output="x")])
    assert [each.output for each in made] == ["x_2", "x"]
