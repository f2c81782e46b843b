"""Files that a killed run may have left."""

from __future__ import annotations

from pathlib import Path

from dawhisper.files import json_lines


def test_json_lines_of_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(json_lines(path)) == []
    path.write_text('{"text": "one\u2028line\x85"}\n\n{"text": "two"}\n{"text": "thr', "utf-8")
    assert list(json_lines(path)) == [{"text": "one\u2028line\x85"}, {"text": "two"}]
