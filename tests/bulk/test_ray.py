"""The pipeline of docs/bulk.md on Ray: a bad file is a row, a killed actor is replaced, a rerun does the rest."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.sound import noise, write_wav

from dawhisper import bulk

ray = pytest.importorskip("ray", reason="needs ray: pip install 'dawhisper[ray]'")
parquet = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).resolve().parent.parent.parent


class Fragile(bulk.Transcriber):
    """Its process dies the first time that it meets a recording called "deadly"."""

    def __call__(self, batch: Any) -> Any:
        died = Path(batch["path"][0]).parent.parent / "died"
        if any("deadly" in path for path in batch["path"]) and not died.exists():
            died.touch()
            os._exit(1)
        return super().__call__(batch)


@pytest.mark.timeout(600)
def test_the_pipeline_of_the_docs(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i, name in enumerate(("0", "1", "deadly", "2")):
        write_wav(folder / f"{name}.wav", noise(1 + i))
    (folder / "bad.wav").write_text("no sound")
    (code,) = re.findall(r"^```py\n(.*?ray.*?)^```", (ROOT / "docs/bulk.md").read_text("utf-8"), re.M | re.S)
    tiny = f'{{"model": "{world["model"]}", "device": "cpu", "language": "en", "temperature": 0.0}}'
    for said, here in (
        ("ray.init()", ""),
        ('{"model": "dawhisper-base", "batch_size": 16}', tiny),
        ("batch_size=64, num_gpus=1", "batch_size=1, num_cpus=0.5"),
    ):
        assert said in code
        code = code.replace(said, here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bulk, "Transcriber", Fragile)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        exec(code, {})
        rows = parquet.read_table("out").to_pylist()
        assert sorted(Path(row["path"]).stem for row in rows) == ["0", "1", "2", "bad", "deadly"]
        assert [Path(row["path"]).stem for row in rows if row["error"]] == ["bad"]
        assert all("bytes" not in row for row in rows)
        assert (tmp_path / "died").exists()
        write_wav(folder / "bad.wav", noise(2))
        exec(code, {})
        rows = parquet.read_table("out").to_pylist()
        assert [Path(row["path"]).stem for row in rows].count("bad") == 2 and len(rows) == 6
        assert bulk.missing(map(str, folder.iterdir()), "out") == []
    finally:
        ray.shutdown()
