"""Who speaks, as OpenAI's diarized_json tells it, with a diariser that is told beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest
from helpers.models import pair
from helpers.server import Running, post, running, sound, wav

from dawhisper.serve.service import letters_of
from dawhisper.speakers import Turn, each_speaker
from dawhisper.timing import Word
from dawhisper.transcription import Segment

TURNS = [Turn(0.5, 2.0, "SPEAKER_00"), Turn(0.0, 0.5, "SPEAKER_01")]


def diarize(samples: np.ndarray) -> list[Turn]:
    if not samples.any():
        raise RuntimeError("nothing\nto tell apart")
    return TURNS


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running({"plain": pair(eot_bias=6.0)[0]}, diarizer=diarize) as made:
        yield made


def test_openais_client_reads_who_speaks(server: Running) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    create = client.audio.transcriptions.create
    told = create(model="plain", file=("a.wav", wav(sound(0))), response_format="diarized_json")
    assert isinstance(told, openai.types.audio.TranscriptionDiarized)
    assert "".join(piece.text for piece in told.segments).strip() == told.text != ""
    assert told.duration == 2.0 and told.task == "transcribe"
    assert {piece.speaker for piece in told.segments} <= {"A", "B"}  # A begins
    for piece in told.segments:
        covered = {s: min(piece.end, e) - max(piece.start, b) for s, b, e in (("A", 0.0, 0.5), ("B", 0.5, 2.0))}
        assert piece.end == piece.start or covered[piece.speaker] > 0
    assert len({piece.id for piece in told.segments}) == len(told.segments)

    with create(model="plain", file=("a.wav", wav(sound(0))), response_format="diarized_json", stream=True) as events:
        seen = list(events)
    pieces = [event for event in seen if event.type == "transcript.text.segment"]
    assert [(p.id, p.start, p.end, p.text, p.speaker) for p in pieces] == [
        (p.id, p.start, p.end, p.text, p.speaker) for p in told.segments
    ]
    deltas = [event for event in seen if event.type == "transcript.text.delta"]
    assert [delta.segment_id for delta in deltas] == [piece.id for piece in pieces]
    assert seen[-1].type == "transcript.text.done" and seen[-1].text == told.text


def test_what_can_not_be_told(server: Running, random_server: Running) -> None:
    refused = post(random_server, response_format="diarized_json")
    assert refused.status_code == 400 and "--diarize" in refused.json()["error"]["message"]
    failed = post(server, ("a.wav", wav(np.zeros(16000, np.float32))), response_format="diarized_json")
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "who speaks can't be told: nothing to tell apart"
    both = post(server, response_format="diarized_json", stream="true", **{"timestamp_granularities[]": "word"})
    assert both.status_code == 400 and both.json()["error"]["param"] == "timestamp_granularities"


def test_pieces_of_a_segment() -> None:
    times = [(" one", 0.0, 0.4, "A"), (" two", 0.4, 0.6, None), (" three", 0.6, 1.0, "B")]
    words = [Word(word, start, end, 1.0, speaker=speaker) for word, start, end, speaker in times]
    segment = Segment(3, 0, 0.0, 1.0, " one two three", [1], 0.0, -0.1, 1.0, 0.0, words)
    assert each_speaker(segment) == [Turn(0.0, 0.6, "A", " one two"), Turn(0.6, 1.0, "B", " three")]
    assert [letters_of(n) for n in (0, 25, 26, 27, 702)] == ["A", "Z", "AA", "AB", "AAA"]
