"""OpenAI's realtime transcription protocol, with its own client, and raw events for what that client can't send."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from helpers.models import pair
from helpers.server import Running, pcm, running, sound
from helpers.text import words_in, wrong_words
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from dawhisper.audio import load_audio
from dawhisper.serve.realtime import Decoder, Format, SessionSettings

TRANSCRIPTION = "conversation.item.input_audio_transcription"
MANUAL: Any = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def session(server: Running, **options: Any) -> Any:
    return client(server).realtime.connect(extra_query={"intent": "transcription"}, **options)


def until(connection: Any, kind: str) -> list[Any]:
    """The events up to the first of a kind."""
    got = []
    while not got or got[-1].type != kind:
        got.append(connection.recv())
        assert got[-1].type != "error" or kind == "error", got[-1]
    return got


def append(connection: Any, data: bytes, size: int = 9601) -> None:
    for first in range(0, len(data), size):  # odd pieces: samples may be cut in half
        connection.input_audio_buffer.append(audio=base64.b64encode(data[first : first + size]).decode())


def test_openais_client_transcribes_turns(real_server: Running, assets: Path) -> None:
    """24 kHz as it is by default, turns found by the server: deltas while somebody speaks, then the whole."""
    speech = load_audio(assets / "speech.opus", 24000)
    with session(real_server) as connection:
        created = connection.recv()
        assert created.type == "session.created"
        assert created.session.audio.input.format.rate == 24000
        assert created.session.audio.input.turn_detection.type == "server_vad"
        connection.session.update(
            session={
                "type": "transcription",
                "audio": {
                    "input": {
                        "transcription": {"model": "whisper-1", "language": "en"},
                        "turn_detection": {"type": "server_vad", "silence_duration_ms": 1200},
                    }
                },
                "include": ["item.input_audio_transcription.logprobs"],
            }
        )
        assert connection.recv().session.audio.input.transcription.language == "en"
        append(connection, pcm(np.pad(speech, (24000, 48000))))
        events = until(connection, f"{TRANSCRIPTION}.completed")
        kinds = [e.type for e in events]
        assert kinds[0] == "input_audio_buffer.speech_started"
        order = ["input_audio_buffer.speech_stopped", "input_audio_buffer.committed", "conversation.item.added"]
        assert kinds[-4:-1] == order
        deltas = [e for e in events if e.type == f"{TRANSCRIPTION}.delta"]
        assert len(deltas) > 1  # as it is spoken
        done = events[-1]
        assert "".join(e.delta for e in deltas).strip() == done.transcript
        assert wrong_words(done.transcript) <= 4
        assert {e.item_id for e in (*deltas, events[0], done)} == {done.item_id}
        assert abs(events[0].audio_start_ms - 700) < 400  # 1 s of silence, less 300 ms before the speech
        assert events[-4].audio_end_ms > events[0].audio_start_ms + 2000
        assert done.usage.type == "duration"
        assert "".join(p.token for p in done.logprobs).strip() == done.transcript
        assert [p for e in deltas for p in e.logprobs] == done.logprobs

        connection.session.update(session=MANUAL)  # a second turn, which the client ends
        until(connection, "session.updated")
        append(connection, pcm(speech))
        connection.input_audio_buffer.commit()
        events = until(connection, f"{TRANSCRIPTION}.completed")
        assert wrong_words(events[-1].transcript) <= 4
        committed = next(e for e in events if e.type == "input_audio_buffer.committed")
        assert committed.previous_item_id == done.item_id
        assert "input_audio_buffer.speech_started" not in [e.type for e in events]


def test_formats_and_what_is_cleared(real_server: Running, assets: Path) -> None:
    """The beta's flat session, G.711, 16 kHz, and audio that the client takes back."""
    import av

    speech = load_audio(assets / "speech.opus", 8000)
    codec = av.CodecContext.create("pcm_mulaw", "w")
    codec.sample_rate, codec.layout, codec.format = 8000, "mono", "s16"
    frame = av.AudioFrame.from_ndarray((speech * 32767).astype(np.int16)[None], "s16", "mono")
    frame.sample_rate = 8000
    law = b"".join(bytes(packet) for packet in codec.encode(frame))
    headers = {"OpenAI-Beta": "realtime=v1"}
    url = real_server.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    with connect(url, additional_headers=headers) as raw:

        def said(**event: Any) -> None:
            raw.send(json.dumps(event))

        def heard(kind: str) -> dict[str, Any]:
            while (event := json.loads(raw.recv()))["type"] != kind:
                assert event["type"] != "error", event
            return event  # type: ignore[no-any-return]

        assert heard("transcription_session.created")["session"]["input_audio_format"] == "pcm16"
        beta = {"input_audio_format": "g711_ulaw", "turn_detection": None, "input_audio_transcription": {"prompt": "A"}}
        said(type="transcription_session.update", session=beta)
        assert heard("transcription_session.updated")["session"]["input_audio_format"] == "g711_ulaw"
        said(type="input_audio_buffer.append", audio=base64.b64encode(law[:8000]).decode())
        said(type="input_audio_buffer.clear")
        heard("input_audio_buffer.cleared")
        said(type="input_audio_buffer.append", audio=base64.b64encode(law).decode())
        said(type="input_audio_buffer.commit")
        event = heard(f"{TRANSCRIPTION}.completed")
        assert {"modern", "practiced"} <= set(words_in(event["transcript"]).split())  # the telephone loses the rest
        assert event["usage"]["seconds"] == pytest.approx(len(speech) / 8000, abs=0.05)
        sixteen = {"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}
        said(type="session.update", session=sixteen)
        assert heard("session.updated")["session"]["audio"]["input"]["format"]["rate"] == 16000


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({"type": "response.create"}, "type"),
        ({"type": "session.update", "session": {"type": "realtime"}}, "session.type"),
        ({"type": "session.update", "session": {"instructions": "x"}}, "session.instructions"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"transcription": {"language": "klingon"}}}}},
            "language",
        ),
        ({"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "gpt-5"}}}}}, "model"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}},
            "session.audio.input.turn_detection.type",
        ),
        (
            {"type": "session.update", "session": {"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}},
            "session.audio.input.noise_reduction",
        ),
        ({"type": "session.update", "session": []}, "session"),
        (
            {"type": "transcription_session.update", "session": {"input_audio_format": "mp3"}},
            "session.input_audio_format",
        ),
        ({"type": "input_audio_buffer.append", "audio": "no base64!"}, "audio"),
        ({"type": "input_audio_buffer.append", "audio": 7}, "audio"),
        ({"type": "input_audio_buffer.commit"}, None),
    ],
)
def test_what_is_not_offered_is_said_and_the_session_goes_on(
    events: Any, event: dict[str, Any], param: str | None
) -> None:
    events.send(json.dumps({**event, "event_id": "mine"}))
    answer = json.loads(events.recv())
    assert answer["type"] == "error"
    assert (answer["error"]["param"], answer["error"]["event_id"]) == (param, "mine")
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def events(random_server: Running) -> Iterator[Any]:
    """One session, in which one wrong event follows the other."""
    with connect(random_server.url.replace("http", "ws") + "/v1/realtime") as raw:
        assert json.loads(raw.recv())["type"] == "session.created"
        yield raw
        raw.send("no json")
        assert json.loads(raw.recv())["error"]["message"] == "a text message is a JSON object"


def test_keys_models_and_intents() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, api_key="secret", max_live=1) as server:
        url = server.url.replace("http", "ws") + "/v1/realtime"
        with pytest.raises(InvalidStatus) as refused, client(server, "guess").realtime.connect():
            pass
        assert refused.value.response.status_code == 401
        with client(server, "secret").realtime.connect(model="gpt-realtime") as connection:
            assert connection.recv().error.code == "model_not_found"
        with client(server, "secret").realtime.connect(extra_query={"intent": "chat"}) as connection:
            assert connection.recv().error.param == "intent"
        browser: Any = ["realtime", "openai-insecure-api-key.secret"]
        with connect(url, subprotocols=browser) as raw:
            assert raw.subprotocol == "realtime"
            assert json.loads(raw.recv())["type"] == "session.created"
            with client(server, "secret").realtime.connect(model="m") as connection:
                assert connection.recv().error.code == "queue_full"


def test_a_failure_is_the_turns_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"m": pair(eot_bias=6.0)[0]}) as server, session(server) as connection:
        connection.recv()
        connection.session.update(session=MANUAL)
        until(connection, "session.updated")
        with monkeypatch.context() as broken:
            broken.setattr(server.engine, "submit", lambda work: 1 / 0)
            append(connection, pcm(sound(0)))
            connection.input_audio_buffer.commit()
            assert until(connection, f"{TRANSCRIPTION}.failed")[-1].error.code == "internal_error"
        append(connection, pcm(sound(0)))
        connection.input_audio_buffer.commit()
        assert until(connection, f"{TRANSCRIPTION}.completed")


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
def test_samples_keep_their_times_whatever_the_pieces(rate: int) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)).astype(np.float32)
    data, decoder = pcm(tone), Decoder(Format(type="audio/pcm", rate=rate))
    made = np.concatenate([*(decoder.add(data[i : i + 1001]) for i in range(0, len(data), 1001)), decoder.flush()])
    assert len(made) == pytest.approx(32000, abs=40)
    exact = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(made)) / 16000)
    assert np.abs(made - exact)[200:-200].max() < 0.01
    assert len(decoder.add(data)) > 0  # after a flush it goes on


def test_settings_are_updated_in_part() -> None:
    one = SessionSettings().updated({"audio": {"input": {"turn_detection": {"silence_duration_ms": 900}}}})
    two = one.updated({"audio": {"input": {"format": {"type": "audio/pcmu"}}}})
    assert two.audio.input.turn_detection == one.audio.input.turn_detection
    assert one.audio.input.turn_detection
    assert one.audio.input.turn_detection.silence_duration_ms == 900
    assert (two.audio.input.format.hertz, two.audio.input.format.rate) == (8000, None)
