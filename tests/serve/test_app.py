"""The server: OpenAI's client against it, requests together, limits, bad requests, metrics, and its end."""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from helpers.models import pair, talkative, trained
from helpers.server import PART, PATH, Running, post, running, sound, start, wav
from websockets.sync.client import connect

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.errors import OptionError
from dawhisper.serve.forms import checked_form
from dawhisper.serve.options import ServerOptions
from dawhisper.serve.server import load_models
from dawhisper.serve.worker import Engine, TranscriptionTask, transcribe_together
from dawhisper.transcribe import transcribe
from dawhisper.transcription import Segment, TranscribeOptions

SURE = {"logprob_threshold": None, "no_speech_threshold": None, "compression_ratio_threshold": None}


# --------------------------------------------------------------------------------------------------- openai's client


def test_openais_client_works_unmodified(real_server: Running, assets: Path, tiny_en_path: Path) -> None:
    client = openai.OpenAI(base_url=real_server.url + "/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny.en"]
    assert client.models.retrieve("tiny.en").owned_by == "dawhisper"
    clip = assets / "speech.opus"
    create = client.audio.transcriptions.create
    alone = dawhisper.load_model(str(tiny_en_path), device="cpu").transcribe(str(clip))
    plain = create(model="whisper-1", file=clip)
    assert plain.text == alone.text.strip()

    verbose = create(
        model="tiny.en", file=clip, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert verbose.language == "english"
    assert verbose.segments[0].text.strip()  # type: ignore[index]
    words = verbose.words or []
    assert " ".join(w.word for w in words) == verbose.text
    assert all(a.start <= a.end <= b.end for a, b in itertools.pairwise(words))
    assert verbose.duration == pytest.approx(len(load_audio(clip)) / 16000, abs=0.01)

    events = list(create(model="tiny.en", file=clip, stream=True))
    assert [e.type for e in events[-2:]] == ["transcript.text.delta", "transcript.text.done"]
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta").strip() == events[-1].text


def test_openais_client_gets_every_format(random_server: Running) -> None:
    client = openai.OpenAI(base_url=random_server.url + "/v1", api_key="none", max_retries=0)
    srt, vtt, text, plain = (
        client.audio.transcriptions.create(model="plain", file=("a.wav", wav(sound(0))), response_format=kind)
        for kind in ("srt", "vtt", "text", "json")
    )
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:\d\d,\d{3}\n", str(srt))
    assert str(vtt).startswith("WEBVTT")
    assert plain.text and str(text).strip() == plain.text


def test_the_log_probabilities_of_tokens(real_server: Running, assets: Path) -> None:
    client = openai.OpenAI(base_url=real_server.url + "/v1", api_key="none", max_retries=0)
    create, clip = client.audio.transcriptions.create, assets / "speech.opus"
    whole = create(model="whisper-1", file=clip, include=["logprobs"])
    tokens = whole.logprobs or []
    assert "".join(t.token or "" for t in tokens).strip() == whole.text
    assert b"".join(bytes(map(int, t.bytes or [])) for t in tokens).decode().strip() == whole.text
    assert all(-10 < (t.logprob or 0) <= 0 for t in tokens)
    events = list(create(model="whisper-1", file=clip, include=["logprobs"], stream=True))
    deltas = [p for e in events if e.type == "transcript.text.delta" for p in e.logprobs or []]
    assert [p.token for p in deltas] == [p.token for p in tokens]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].logprobs
    assert [p.logprob for p in events[-1].logprobs] == pytest.approx([p.logprob for p in tokens], abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="needs response_format=json"):
        create(model="whisper-1", file=clip, include=["logprobs"], response_format="verbose_json")


def test_openais_client_sees_errors(random_server: Running) -> None:
    client = openai.OpenAI(base_url=random_server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="does not exist; there are plain, dual") as error:
        client.audio.transcriptions.create(model="gpt-5", file=("a.wav", wav(sound(0))))
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="ogg") as error:
        client.audio.transcriptions.create(model="plain", file=("a.ogg", b"not audio at all" * 100))
    assert error.value.code == "invalid_audio"
    assert error.value.param == "file"


def test_translation(random_server: Running) -> None:
    client = openai.OpenAI(base_url=random_server.url + "/v1", api_key="none", max_retries=0)
    said = client.audio.translations.create(
        model="plain", file=("a.wav", wav(sound(1))), response_format="verbose_json"
    )
    assert said.duration == pytest.approx(2.0)
    assert said.model_extra["task"] == "translate"  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ requests together


@pytest.mark.parametrize("extra", [{"language": "en"}, {}, {"language": "en", "word_timestamps": True}])
def test_together_is_as_alone(extra: dict[str, object]) -> None:
    model = pair(most=40)[0]
    clips = [sound(seed, seconds) for seed, seconds in enumerate((0.5, 2.0, 7.0))]
    options = TranscribeOptions.of(temperature=0.0, **SURE, **extra)
    for clip, one in zip(clips, transcribe_together(model, clips, options)):
        if one is None:  # further windows
            assert "word_timestamps" in extra
            continue
        alone = transcribe(model, clip, temperature=0.0, **SURE, **extra)
        assert one.text == alone.text
        assert one.language == alone.language
        assert [(s.start, s.end) for s in one.segments] == [(s.start, s.end) for s in alone.segments]


def test_clips_in_the_queue_are_decoded_together_and_not_mixed_up(tiny_en_path: Path, assets: Path) -> None:
    model = dawhisper.load_model(str(tiny_en_path), device="cpu")
    speech = load_audio(assets / "speech.opus")
    clips = [speech[16000 * i : 16000 * (i + 2)] for i in range(0, 6, 2)]
    once = {"temperature": 0.0, "language": "en", "without_timestamps": True, **SURE}
    expected = [transcribe(model, clip, **once).text for clip in clips]  # type: ignore[union-attr, arg-type]
    assert len(set(expected)) == 3
    sizes: list[int] = []
    engine = Engine({"m": model}, batch_size=2, on_batch=lambda model, waited: sizes.append(len(waited)))
    together = threading.Event()
    try:
        engine.submit(partial(together.wait, 20))  # so that the clips wait together
        futures = [engine.submit(TranscriptionTask("m", clip, TranscribeOptions.of(**once))) for clip in clips]
        together.set()
        assert [f.result(60).text for f in futures] == expected
        assert sizes == [2, 1]
    finally:
        engine.close()


def test_clips_of_like_length_are_decoded_together_where_the_context_varies() -> None:
    """The seconds that are encoded are the same, so that nobody hears another one's padding."""
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=6.0)
    model.variable_audio_ctx = True
    clips = [sound(seed, seconds) for seed, seconds in enumerate((2.1, 5.0, 2.9, 4.2, 2.5, 9.0))]
    brief = {"temperature": 0.0, "language": "en", "word_timestamps": True, "without_timestamps": True, "sample_len": 6}
    options = TranscribeOptions.of(**brief, **SURE)
    expected = [transcribe(model, clip, **brief, **SURE) for clip in clips]  # type: ignore[arg-type]
    sizes: list[int] = []
    engine = Engine({"m": model}, on_batch=lambda model, waited: sizes.append(len(waited)))
    together = threading.Event()
    try:
        engine.submit(partial(together.wait, 20))  # so that the clips wait together
        futures = [engine.submit(TranscriptionTask("m", clip, options)) for clip in clips]
        together.set()
        for future, alone in zip(futures, expected):
            heard = future.result(60)
            assert heard.text == alone.text
            assert [w.gate for s in heard.segments for w in s.words or []] == pytest.approx(
                [w.gate for s in alone.segments for w in s.words or []], abs=2e-3
            )
        assert [size for size in sizes if size > 1] == [3, 2]
    finally:
        engine.close()


def test_live_audio_does_not_wait_for_a_long_recording() -> None:
    model = pair(eot_bias=6.0)[0]
    brief = TranscribeOptions.of(temperature=0.0, language="en", without_timestamps=True, sample_len=6, **SURE)
    order: list[str] = []
    engine = Engine({"m": model})
    began, waits = threading.Event(), threading.Event()

    def on_segment(segment: Segment) -> None:
        order.append("window")
        began.set()
        assert waits.wait(30)

    try:
        long = engine.submit(TranscriptionTask("m", sound(0, 65.0), brief, on_segment))
        assert began.wait(30)
        live = engine.submit(lambda: order.append("live"))
        waits.set()
        live.result(30)
        long.result(60)
        assert order == ["window", "live", "window", "window"]
    finally:
        engine.close()


def surety(answer: httpx.Response) -> float:
    """What differs from recording to recording where a random model's text does not."""
    return answer.json()["segments"][0]["avg_logprob"]  # type: ignore[no-any-return]


def test_concurrent_requests_get_their_own_answers(random_server: Running) -> None:
    files = [("a.wav", wav(sound(seed, 0.5 + seed / 40))) for seed in range(32)]
    fields = {"response_format": "verbose_json", "language": "en"}
    alone = [surety(post(random_server, file, **fields)) for file in files]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda file: post(random_server, file, **fields), files))
    assert [a.status_code for a in answers] == [200] * 32
    assert [a.json()["duration"] for a in answers] == pytest.approx([0.5 + i / 40 for i in range(32)], abs=0.01)
    assert len({round(value, 4) for value in alone}) > 16
    assert [surety(a) for a in answers] == pytest.approx(alone, abs=2e-5)


def test_the_gate_of_words(random_server: Running) -> None:
    fields = {
        "model": "dual",
        "response_format": "verbose_json",
        "include[]": "gate",
        "timestamp_granularities[]": "word",
        "language": "en",
    }
    words = post(random_server, **fields).json()["words"]
    assert words
    assert all(0 < w["gate"] < 1 for w in words if w.get("gate") is not None)
    assert any(w.get("gate") is not None for w in words)


# ----------------------------------------------------------------------------------------------------------- limits


def test_too_many_requests_get_429() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, max_queue=2, batch_size=1) as server, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: post(server, ("a.wav", wav(sound(seed)))), range(12)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429}
        refused = answers[codes.index(429)]
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "queue_full"
        assert post(server).status_code == 200


def test_too_large_an_upload_gets_413(random_server: Running) -> None:
    assert post(random_server, ("a.wav", bytes(3_000_000))).status_code == 413

    def chunks() -> Iterator[bytes]:  # without a length
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(random_server.url + PATH, content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_too_long_a_recording_and_too_long_a_request() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, max_audio=1.0) as server:
        assert post(server).json()["error"]["code"] == "too_long"
    with running({"m": pair(eot_bias=6.0)[0]}, timeout=0.001) as server:
        answer = post(server, ("a.wav", wav(sound(0, 60.0))))
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"


def test_the_key() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, api_key="secret") as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert post(server).json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer secret"}
        assert httpx.get(server.url + "/v1/models", headers=right).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200
        with connect(server.ws) as live:
            live.send(json.dumps({"api_key": "guess"}))
            assert json.loads(live.recv())["error"]["code"] == "invalid_api_key"


def test_hotwords_reach_the_decoder(random_server: Running) -> None:
    asked = checked_form({"hotwords": ["Szeged, Nagy"]}, random_server.service, "transcribe")
    assert asked.options.decoding.hotwords == "Szeged, Nagy"
    assert post(random_server, hotwords="Szeged, Nagy").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "pdf"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"language": "klingon"}, "language"),
        ({"stream": "perhaps"}, "stream"),
        ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"hotwords": "x" * 5000}, "hotwords"),
        ({"include[]": "usage"}, "include"),
        ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy"),
        ({"known_speaker_names[]": "Ann"}, "known_speaker_names"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"vad_filter": "true"}, "vad_filter"),
    ],
)
def test_bad_fields(random_server: Running, fields: dict[str, str], param: str) -> None:
    answer = post(random_server, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_what_other_clients_send() -> None:
    """A scheme and a media type in any case, indexed lists, HEAD, a final slash, paths and methods that are not."""
    with running({"m": pair(eot_bias=6.0)[0]}, api_key="secret") as server:
        key = {"Authorization": "bearer secret"}
        files = {"file": ("a.wav", wav(sound(0)))}
        assert httpx.post(server.url + PATH, files=files, headers=key, timeout=60).status_code == 200
        wrong = httpx.get(server.url + "/v1/models", headers={"Authorization": "secret"})
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        body = PART + wav(sound(0)) + b"\r\n--x\r\n"
        for name, value in (("response_format", "verbose_json"), ("timestamp_granularities[0]", "word")):
            body += f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--x\r\n'.encode()
        body = body.removesuffix(b"\r\n") + b"--\r\n"
        headers = {**key, "Content-Type": "Multipart/Form-Data; boundary=x"}
        answer = httpx.post(server.url + PATH, content=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert "words" in answer.json()
        for path in ("/health", "/metrics", "/", "/app.js", "/v1/models", "/v1/models/m"):
            assert httpx.head(server.url + path, headers=key).status_code == 200, path
        assert httpx.post(server.url + PATH + "/", headers=key).status_code == 307
        assert httpx.post(server.url + "/audio/transcriptions", headers=key).status_code == 404
        assert httpx.get(server.url + "/v1/nothing").json()["error"]["code"] == "not_found"
        refused = httpx.get(server.url + PATH, headers=key)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_other_origins_and_other_names() -> None:
    app = "https://app.example"
    asking = {"Origin": app, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    model = pair(eot_bias=6.0)[0]
    with running({"m": model}, allow_origin=(app,), alias=("gpt-4o-transcribe=m",), api_key="secret") as server:
        preflight = httpx.options(server.url + PATH, headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == app
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert httpx.options(server.url + PATH, headers={**asking, "Origin": "https://evil.example"}).status_code == 400
        refused = httpx.get(server.url + "/v1/models", headers={"Origin": app})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, app)
        key = {"Authorization": "Bearer secret"}
        for name, code in (("gpt-4o-transcribe", 200), ("whisper-1", 200), ("tts-1", 404)):
            assert httpx.get(f"{server.url}/v1/models/{name}", headers=key).status_code == code
        with connect(server.ws, origin=app) as live:  # type: ignore[arg-type]
            live.send('{"api_key": "secret", "model": "gpt-4o-transcribe"}')
            assert json.loads(live.recv())["type"] == "ready"
    for options in ({"allow_origin": ("app.example/x",)}, {"alias": ("x",)}):
        with pytest.raises(OptionError):
            ServerOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="there is no model 'n'"):
        ServerOptions(alias=("x=n",)).names(["m"])


def test_the_api_is_described(random_server: Running) -> None:
    described = httpx.get(random_server.url + "/openapi.json").json()
    fields = described["paths"][PATH]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {"file", "model", "language", "stream"} <= set(fields)
    docs = httpx.get(random_server.url + "/docs")
    assert docs.status_code == 200
    assert "://" not in docs.text  # nothing from elsewhere
    assert "://" not in docs.headers["content-security-policy"]


def test_metrics_and_health(random_server: Running) -> None:
    def metric(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(random_server.url + "/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    names = [
        'http_requests_total{handler="/v1/audio/transcriptions",method="POST",status="200"}',
        'http_requests_total{handler="other",method="POST",status="404"}',
        'http_request_duration_seconds_count{handler="/v1/audio/transcriptions",method="POST"}',
        'dawhisper_audio_seconds_total{model="plain"}',
        'dawhisper_batch_size_sum{model="plain"}',
        'dawhisper_queue_seconds_count{model="plain"}',
    ]
    before = [metric(name) for name in names]
    post(random_server)
    httpx.post(random_server.url + "/nowhere")
    assert [metric(name) - was for name, was in zip(names, before)] == pytest.approx([1, 1, 1, 2, 1, 1])
    health = httpx.get(random_server.url + "/health")
    assert health.json() == {"status": "ok", "models": ["plain", "dual"], "waiting": 0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_is_not_healthy() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}) as server:
        server.engine.submit(sys.exit)
        server.engine.thread.join(10)
        assert httpx.get(server.url + "/health").status_code == 503


def test_an_error_in_a_batch_is_its_own_clips() -> None:
    engine = Engine({"m": pair(eot_bias=6.0)[0]})
    options = TranscribeOptions.of(temperature=0.0, language="en", without_timestamps=True, sample_len=6)
    together = threading.Event()
    try:
        engine.submit(partial(together.wait, 20))  # so that the others wait together
        good = engine.submit(TranscriptionTask("m", sound(0), options))
        bad = engine.submit(TranscriptionTask("m", np.zeros((2, 2, 2), np.float32), options))
        together.set()
        assert good.result(30).language == "en"
        with pytest.raises(dawhisper.DawhisperError):
            bad.result(30)
    finally:
        engine.close()


# ----------------------------------------------------------------------------------------------------- the process


def test_the_end_finishes_what_runs_and_a_killed_server_starts_again(tiny_en_path: Path, assets: Path) -> None:
    sentence = np.concatenate([load_audio(assets / "speech.opus"), np.zeros(10 * 16000, np.float32)])
    clip = ("a.wav", wav(np.tile(sentence, 4)))
    for sig in (signal.SIGKILL, signal.SIGTERM):
        process, url = start(tiny_en_path)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, Running(url, None, None), clip)  # type: ignore[arg-type]
            while "dawhisper_active_requests 1.0" not in httpx.get(url + "/metrics").text:
                assert not answer.done()
            process.send_signal(sig)
            if sig == signal.SIGTERM:
                assert "printers" in answer.result(60).json()["text"]
            else:
                with pytest.raises(httpx.TransportError):
                    answer.result(60)
        process.wait(30)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="--max_queue is above 0"):
        ServerOptions(max_queue=0)
    with pytest.raises(dawhisper.DawhisperError, match="no such"):
        load_models(("x=/nowhere/a.pt",), "cpu")
