"""Rows in, rows out: every row has its answer in its place, as text or as an error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.sound import noise, write_wav

from dawhisper.bulk import Transcriber, missing
from dawhisper.errors import OptionError


@pytest.fixture(scope="module")
def transcriber(world: dict[str, Path]) -> Transcriber:
    return Transcriber(str(world["model"]), "cpu", batch_size=2, language="en", temperature=0.0, sample_len=4)


def test_rows_of_paths_and_of_bytes(transcriber: Transcriber, tmp_path: Path) -> None:
    good = write_wav(tmp_path / "good.wav", noise(2))
    paths = np.array([str(good), str(tmp_path / "none.wav"), str(good), None], object)
    made = transcriber({"path": paths, "language": [None, None, "de", None], "id": [7, 8, 9, 10]})
    assert list(made) == ["path", "language", "id", "text", "segments", "duration", "error"]
    assert made["id"] == [7, 8, 9, 10] and made["language"] == ["en", "", "de", ""]
    assert made["duration"] == [2.0, 0.0, 2.0, 0.0]
    assert [bool(error) for error in made["error"]] == [False, True, False, True]
    assert "none.wav: no such file" in made["error"][1] and "neither a path nor bytes" in made["error"][3]
    assert all(isinstance(json.loads(segments), list) for segments in made["segments"])

    content = np.array([good.read_bytes(), b"no sound"], object)
    made = transcriber({"path": np.array(["s3://a.wav", "s3://b.wav"]), "bytes": content})
    assert "bytes" not in made and made["duration"] == [2.0, 0.0]
    assert made["error"][0] == "" and made["error"][1].startswith("s3://b.wav: cannot be decoded")
    assert transcriber({"path": []}) == {
        "path": [],
        "text": [],
        "language": [],
        "segments": [],
        "duration": [],
        "error": [],
    }
    with pytest.raises(OptionError, match="no column path or bytes, but text"):
        transcriber({"text": ["a"]})


def test_it_travels_without_its_model(transcriber: Transcriber, tmp_path: Path) -> None:
    assert transcriber.model is transcriber.model
    data = pickle.dumps(transcriber)
    assert len(data) < 5000
    assert pickle.loads(data)({"path": [str(tmp_path / "none")]})["error"]


def test_frames(transcriber: Transcriber, tmp_path: Path) -> None:
    """Spark's and Dask's rows; what is written is not done again, unless it failed."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    good, bad = str(write_wav(tmp_path / "good.wav", noise(1))), str(tmp_path / "bad.wav")
    (made,) = transcriber.over([pandas.DataFrame({"path": [good, bad]})])
    assert isinstance(made, pandas.DataFrame) and list(made["error"] == "") == [True, False]
    made.to_parquet(tmp_path / "part.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "part.parquet").read_bytes()[:300])
    assert missing([good, bad, "s3://new"], tmp_path) == [bad, "s3://new"]
