"""Rows with recordings -> rows with text, for engines that map batches of rows: Ray Data, Spark, Dask."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dawhisper.checkpoint import OWN_MODEL, load_model
from dawhisper.errors import DataError, DawhisperError, OptionError
from dawhisper.model import Whisper
from dawhisper.transcription import Settings, TranscribeOptions

from .inputs import Content, Input
from .outcomes import Outcome, transcribe_inputs

CELLS: dict[str, Callable[[Outcome], Any]] = {
    "text": lambda heard: heard.result.text.strip() if heard.result else "",
    "language": lambda heard: heard.result.language if heard.result else "",
    "segments": lambda heard: json.dumps(heard.result.to_dict()["segments"] if heard.result else []),
    "duration": lambda heard: heard.duration,
    "error": lambda heard: heard.error,
}
SPARK_SCHEMA = "text string, language string, segments string, duration double, error string"


class Transcriber:
    """Maps batches of rows: each row has a recording, and gets what was heard in it.

    A batch is a dict of columns, as Ray gives, or a pandas DataFrame, as Spark and Dask do; the result is of the same
    kind. Its recordings are in the column "bytes" (a file's content) or, without it, "path" (a file or an address); the
    columns "language", "task" and "prompt" may say more of a row, as in a manifest. All columns but "bytes" are kept,
    and these are added:

    text, language: what was said, and the code of the language. segments: JSON, as in `transcribe`'s .json.
    duration: seconds. error: why there is no text; "" where there is. A bad row never ends a batch.

    The model is loaded at the first batch of each process, so this may be sent to them. Options are those of
    `dawhisper.transcribe`; `batch_size` counts windows decoded together, of all rows of a batch.
    """

    def __init__(
        self,
        model: str = OWN_MODEL,
        device: str | None = None,
        dtype: str | None = "auto",
        batch_size: int | None = 16,
        **options: Any,
    ):
        self.options = TranscribeOptions.of(batch_size=batch_size, **options)
        self.name, self.device, self.dtype = model, device, dtype
        self._model: Whisper | None = None

    @property
    def model(self) -> Whisper:
        if self._model is None:
            self._model = load_model(self.name, self.device, self.dtype)
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __call__(self, batch: Any) -> Any:
        """A batch with what was heard; raises OptionError where it has no column of recordings."""
        columns = {name: list(batch[name]) for name in batch}
        if not {"path", "bytes"} & set(columns):
            raise OptionError(f"the rows have no column path or bytes, but {', '.join(map(str, columns)) or 'none'}")
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        heard = {int(outcome.item.output): outcome for outcome in self._hear(rows)}
        made = {name: values for name, values in columns.items() if name != "bytes"}
        for column, cell in CELLS.items():
            made[column] = [cell(heard[number]) for number in range(len(rows))]
        return type(batch)(made)

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Each batch with what was heard, for Spark's mapInPandas."""
        return map(self, batches)

    def _hear(self, rows: list[dict[str, Any]]) -> Iterator[Outcome]:
        """What became of each row, in any order; the number of a row is the name of its outputs."""
        good = []
        for number, row in enumerate(rows):
            try:
                good.append(row_input(row, str(number)))
            except DawhisperError as error:
                name = str(row.get("path") or "a row")
                yield Outcome(Input(name, str(number)), error=f"{name}: {error}")
        yield from transcribe_inputs(self.model, good, self.options)


def row_input(row: Mapping[str, Any], number: str) -> Input:
    """A row's recording; DataError and OptionError where it has none, or settings that can't be."""
    path, content = row.get("path"), row.get("bytes")
    given = [row.get(name) for name in ("language", "task", "prompt")]
    settings = Settings(*(value if isinstance(value, str) and value else None for value in given))
    if isinstance(content, bytes):
        return Input(Content(content, str(path or "the bytes")), number, settings=settings)
    if not isinstance(path, str) or not path:
        raise DataError("there is neither a path nor bytes in it")
    return Input(path, number, settings=settings)


def missing(paths: Iterable[str], out: str | os.PathLike[str]) -> list[str]:
    """The paths of which no row without error is in the Parquet files of a folder: what a call that was stopped left.

    Files that were not written to their end are passed over. Needs pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise OptionError("this needs pyarrow, which is not installed: pip install 'dawhisper[ray]'") from None

    done: set[str] = set()
    for file in sorted(Path(out).glob("**/*.parquet")):
        try:
            table = parquet.read_table(file, columns=["path", "error"])
        except (pyarrow.ArrowException, OSError):
            continue
        done |= {without_scheme(row["path"]) for row in table.to_pylist() if not row["error"]}
    return [path for path in paths if without_scheme(path) not in done]


def without_scheme(path: str) -> str:
    """A path without "s3://" and the like, as Ray's readers give it."""
    return path.partition("://")[2] or path
