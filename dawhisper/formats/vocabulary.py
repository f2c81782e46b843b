"""How many rows of a Hugging Face model's embedding are Whisper's; a fine-tune may have added others behind them.

Whisper's special tokens lie behind its words, and their places depend on the number of languages; a fine-tune may have
rows behind them. Where the special tokens are is read from what comes with the model, never guessed from its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dawhisper.errors import CheckpointError

NO_TIMES = "<|notimestamps|>"
PLACES = {  # a special token's place -> rows of the vocabulary that has it there: English, 99 and 100 languages
    "<|transcribe|>": {50358: 51864, 50359: 51865, 50360: 51866},
    NO_TIMES: {50362: 51864, 50363: 51865, 50364: 51866},
    "<|0.00|>": {50363: 51864, 50364: 51865, 50365: 51866},
}
VOCABULARY_SIZES = (51864, 51865, 51866)


def whisper_rows(folder: Path, config: Mapping[str, Any]) -> int:
    """Rows of Whisper's own vocabulary in a folder's model; CheckpointError where nothing tells."""
    size = config["vocab_size"]
    told = {rows for source in (_generation, _tokens, _forced) for rows in source(folder, config) if rows}
    if len(told) > 1 or any(not 0 < rows <= size for rows in told):
        raise CheckpointError(f"{folder}: its files disagree about where Whisper's special tokens are; get them again")
    if told:
        return told.pop()
    added = _first_added(folder)
    if added is not None and added in VOCABULARY_SIZES:
        return added
    # 128 mel channels came with the hundredth language
    if size == 51866 and config.get("num_mel_bins") == 80:
        size = 0
    if size in VOCABULARY_SIZES or 0 < size < min(VOCABULARY_SIZES):
        return size
    raise CheckpointError(
        f"{folder}: a vocabulary of {config['vocab_size']} tokens, and nothing here says which of them are Whisper's; "
        "put the model's generation_config.json or tokenizer.json into the folder"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what can't be read tells nothing
        return None


def _generation(folder: Path, config: Mapping[str, Any]) -> Iterator[int | None]:
    generation = _read(folder / "generation_config.json")
    if isinstance(generation, dict):
        yield _at(NO_TIMES, generation.get("no_timestamps_token_id"))
        tasks = generation.get("task_to_id")
        yield _at("<|transcribe|>", tasks.get("transcribe") if isinstance(tasks, dict) else None)


def _tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[int | None]:
    for content, place in _listed(folder):
        yield _at(content, place)


def _forced(folder: Path, config: Mapping[str, Any]) -> Iterator[int | None]:
    """forced_decoder_ids are [[1, language], [2, task], [3, no time stamps]]."""
    forced = config.get("forced_decoder_ids")
    for pair in forced if isinstance(forced, list) else []:
        if isinstance(pair, list) and len(pair) == 2 and pair[0] == 3:
            yield _at(NO_TIMES, pair[1])


def _at(token: str, place: object) -> int | None:
    """The rows of the vocabulary where this token has this place: -1 for none, None for a token that tells nothing."""
    if token not in PLACES or place is None:
        return None
    return PLACES[token].get(place, -1) if isinstance(place, int) else -1


def _listed(folder: Path) -> Iterator[tuple[str, int]]:
    """The tokens beside the words, and their places, from any of a tokenizer's files."""
    added = _read(folder / "added_tokens.json")
    for content, place in added.items() if isinstance(added, dict) else ():
        yield str(content), place
    config = _read(folder / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    for place, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(place).isdigit() and isinstance(token, dict):
            yield str(token.get("content")), int(place)
    tokenizer = _read(folder / "tokenizer.json")
    listed = tokenizer.get("added_tokens") if isinstance(tokenizer, dict) else None
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield str(token.get("content")), token["id"]


def _first_added(folder: Path) -> int | None:
    """The place of the first token behind Whisper's words that is none of its special ones, <|so|>."""
    others = (place for content, place in _listed(folder) if not re.fullmatch(r"<\|.*\|>", content))
    return min((place for place in others if isinstance(place, int) and place >= min(VOCABULARY_SIZES)), default=None)
