"""A format that is added to WRITERS is written like the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import pytest
from whisper.utils import ResultWriter

from dawhisper.transcribe_files import WriterOptions, write_outputs
from dawhisper.transcription import Segment, Transcription
from dawhisper.writers import WRITERS


class WriteSBV(ResultWriter):
    extension = "sbv"

    def write_result(self, result: dict[str, Any], file: TextIO, *_: Any, **__: Any) -> None:
        for segment in result["segments"]:
            print(f"{segment['start']},{segment['end']}\n{segment['text']}\n", file=file)


@pytest.mark.parametrize("chosen", ["sbv", "all"])
def test_a_new_format(chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WRITERS, "sbv", WriteSBV)
    segment = Segment(0, 0, 0.0, 1.5, "one <two>", [1], 0.0, -0.1, 1.0, 0.0)
    write_outputs(Transcription("one <two>", [segment], "en"), "clip", tmp_path, WriterOptions(chosen))
    assert (tmp_path / "clip.sbv").read_text() == "0.0,1.5\none <two>\n\n"
    written = {path.suffix[1:] for path in tmp_path.iterdir()}
    assert written == ({"txt", "vtt", "srt", "tsv", "json", "sbv"} if chosen == "all" else {"sbv"})
    if chosen == "all":
        assert "one &lt;two&gt;" in (tmp_path / "clip.vtt").read_text()
        assert "one <two>" in (tmp_path / "clip.srt").read_text()
