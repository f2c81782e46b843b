"""Streaming: every word once, in order, however the audio is cut; bounded memory; pauses; the command."""

from __future__ import annotations

import _thread
import contextlib
import io
import itertools
import json
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.models import pair, talkative, trained
from helpers.text import SPEECH, words_in, wrong_words

import dawhisper
from dawhisper import vad
from dawhisper.audio import load_audio
from dawhisper.cli import main
from dawhisper.decoding import DecodingOptions, DecodingResult, decode_windows, model_tokenizer
from dawhisper.errors import AudioError, OptionError
from dawhisper.model import AudioFeatures
from dawhisper.serve.listen import Terminal
from dawhisper.serve.sources import PIPE_BACKLOG, read_ahead, read_pcm
from dawhisper.serve.stream import LiveWord, Stream, StreamOptions, Update, text_of
from dawhisper.transcription import Segment, TranscribeOptions


def listen(model: dawhisper.Whisper, audio: np.ndarray, piece: int = 16000, **options: object) -> Update:
    stream = Stream(model, StreamOptions(**options))  # type: ignore[arg-type]
    update = Update()
    for first in range(0, len(audio), piece):
        update += stream.feed(audio[first : first + piece])
    return update + stream.finish()


def test_the_names_of_special_tokens_are_text_of_a_prompt() -> None:
    model = pair()[0]
    stream = Stream(model, StreamOptions(language="en", initial_prompt="see <|endoftext|>"))
    assert model_tokenizer(model).decode(stream.context) == " see <|endoftext|>"


@pytest.fixture(scope="module")
def speech(assets: Path) -> np.ndarray:
    """The clip twice with short pauses: longer than what is decoded again."""
    clip = load_audio(assets / "speech.opus")
    return np.tile(np.concatenate([clip, np.zeros(4800, np.float32)]), 2)


@pytest.fixture(scope="module")
def tiny_en(tiny_en_path: Path) -> dawhisper.Whisper:
    return dawhisper.load_model(str(tiny_en_path), device="cpu")


@pytest.mark.parametrize("policy", ["attention", "agreement"])
def test_no_word_is_lost_or_said_twice(tiny_en: dawhisper.Whisper, speech: np.ndarray, policy: str) -> None:
    update = listen(tiny_en, speech, language="en", policy=policy, step=2.0, longest=8.0)
    said = words_in(text_of(update.words))
    for phrase in ("modern printers", "but it is only practiced in the very best establishments"):
        assert said.count(phrase) == 2
    assert wrong_words(said, f"{SPEECH} {SPEECH}") <= 8  # tiny.en mishears three words in the middle of each
    assert update.end_of_turn
    assert "".join(s.text for s in update.segments) == text_of(update.words)
    starts = [word.start for word in update.words]
    assert all(b >= a - 0.3 for a, b in itertools.pairwise(starts))  # times of two decodings may differ a little
    assert [s.id for s in update.segments] == list(range(len(update.segments)))


def test_words_come_before_the_end(tiny_en: dawhisper.Whisper, speech: np.ndarray) -> None:
    stream = Stream(tiny_en, StreamOptions(language="en"))
    early = text_of(stream.feed(speech[: 16000 * 4]).words)
    assert words_in(early).startswith("modern printers")


@pytest.mark.parametrize("piece", [160, 7777, 16000 * 40])
def test_any_size_of_pieces_and_bounded_memory(piece: int) -> None:
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=30.0)
    stream = Stream(model, StreamOptions(language="en", step=5.0, longest=5.0))
    audio = (0.1 * np.random.default_rng(0).normal(size=16000 * 45)).astype(np.float32)
    audio *= np.sin(np.arange(len(audio)) / 8000)  # louder and softer: not a steady background
    for first in range(0, len(audio), piece):
        stream.feed(audio[first : first + piece])
        assert len(stream.buffer) <= 30 * 16000
        assert len(stream.context) <= 64
    assert stream.now == pytest.approx(45.0)
    stream.finish()
    assert len(stream.buffer) == 0


def test_silence_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(pair()[0], StreamOptions(language="en"))
    monkeypatch.setattr(stream, "_decode", lambda: pytest.fail("decoded silence"))
    quiet = (1e-4 * np.random.default_rng(0).normal(size=16000 * 120)).astype(np.float32)
    assert stream.feed(quiet) == Update()
    assert len(stream.buffer) < 16000


def test_a_pause_in_noise_ends_a_turn(tiny_en: dawhisper.Whisper, assets: Path) -> None:
    pytest.importorskip("silero_vad", reason="loudness alone finds no pause in noise: pip install 'dawhisper[vad]'")
    spoken = np.pad(load_audio(assets / "speech.opus"), (0, 16000 * 3))
    noise = 0.02 * np.random.default_rng(0).normal(size=len(spoken))
    noisy = (spoken + noise).astype(np.float32)
    stream = Stream(tiny_en, StreamOptions(language="en"))
    turns = [stream.feed(noisy[first : first + 16000]).end_of_turn for first in range(0, len(noisy), 16000)]
    assert turns.count(True) == 1
    assert any(turns[-3:])


def test_twenty_minutes_take_no_more_memory_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alternately speech-like sound, which is decoded, and silence, which is not."""
    monkeypatch.setattr(vad, "detector", lambda: vad.loudness)
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=30.0)
    stream = Stream(model, StreamOptions(language="en", step=5.0, longest=5.0))
    piece = (0.1 * np.random.default_rng(0).normal(size=16000 * 120)).astype(np.float32)
    piece *= np.sin(np.arange(len(piece)) / 8000)
    piece[16000 * 6 :] = 0.0
    sizes, words, turns = [], 0, 0
    for _ in range(10):
        update = stream.feed(piece)
        words, turns = words + len(update.words), turns + update.end_of_turn
        sizes.append(len(pickle.dumps({k: v for k, v in vars(stream).items() if k != "model"})))
    assert stream.now == 1200.0
    assert words > 30
    assert turns == 10
    assert max(sizes) <= 1.2 * max(sizes[:3])


def test_earlier_text_is_context(tiny_en: dawhisper.Whisper, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    tokenizer = model_tokenizer(tiny_en, "en")

    def decode(model: dawhisper.Whisper, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        prompts.append(tokenizer.decode(list(options.prompt or [])))  # type: ignore[arg-type]
        return decode_windows(model, features, options)

    monkeypatch.setattr("dawhisper.serve.stream.decode_windows", decode)
    stream = Stream(tiny_en, StreamOptions(language="en", initial_prompt="A lecture on books."))
    clip = load_audio(assets / "speech.opus")
    stream.feed(clip)
    said = text_of(stream.feed(np.zeros(16000 * 3, np.float32)).words)
    stream.feed(clip[: 16000 * 2])
    assert prompts[0] == " A lecture on books."
    assert prompts[-1].startswith(" A lecture on books. ")
    assert prompts[-1].endswith(said)
    assert "establishments" in prompts[-1]


def test_gates_of_words() -> None:
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=30.0)
    stream = Stream(model, StreamOptions(language="en"))
    stream.thresholds = TranscribeOptions(
        logprob_threshold=None, compression_ratio_threshold=None, no_speech_threshold=None
    )
    stream.buffer = (0.1 * np.random.default_rng(0).normal(size=16000 * 3)).astype(np.float32)
    words = stream._decode().words
    assert words
    assert all(word.gate is not None and 0 <= word.gate <= 1 for word in words)


@pytest.mark.parametrize("policy", ["attention", "agreement"])
def test_a_loop_ends_with_its_sound_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A model that never ends a text: decodings are as long as can be said, and nothing of them is seen."""
    lengths: list[tuple[float, int]] = []

    def decode(model: dawhisper.Whisper, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        results = decode_windows(model, features, options)
        lengths.append((stream.now, len(results[0].tokens)))
        return results

    monkeypatch.setattr(vad, "detector", lambda: vad.loudness)
    monkeypatch.setattr("dawhisper.serve.stream.decode_windows", decode)
    stream = Stream(pair(eot_bias=-30.0)[0], StreamOptions(language="en", policy=policy))
    stream.thresholds = TranscribeOptions(logprob_threshold=None, no_speech_threshold=None)
    noise = (0.1 * np.random.default_rng(0).normal(size=16000 * 4)).astype(np.float32)
    updates = [stream.feed(piece) for piece in np.split(noise, 4)] + [stream.finish()]
    assert not any(update.words or update.pending for update in updates)
    assert [seconds for seconds, _ in lengths] == [1, 2, 3, 4] + [4] * 6  # the end is tried at each temperature
    assert all(0 < n <= 8 + 12 * seconds for seconds, n in lengths)


AGAIN = " I lower you, you, you, you."
SAID, OTHER, LOOP = " One two three.", " Four five.", " la la la la la la la la la la la la la la la la la la"


@pytest.mark.parametrize(
    ("said", "logprobs", "no_speech", "given"),
    [
        ([SAID, OTHER, OTHER], [-1.5, -1.2, -0.6], 0.1, " Four five."),  # as soon as one is likely
        ([SAID, OTHER, OTHER], [-1.5, -1.2, -1.4], 0.1, " Four five."),  # else the likeliest
        ([OTHER, LOOP, LOOP], [-1.5, -0.2, -0.2], 0.1, " Four five."),  # that does not loop
        ([LOOP, LOOP, LOOP], [-0.2, -0.2, -0.2], 0.1, ""),
        ([OTHER, AGAIN, AGAIN], [-1.5, -0.2, -0.2], 0.1, OTHER),  # a phrase that is said over and over gives way
        ([AGAIN, AGAIN, AGAIN], [-1.5, -1.2, -1.3], 0.1, AGAIN),  # unless it is all that is heard
        ([SAID, OTHER, OTHER], [-1.5, -1.2, -1.3], 0.9, ""),  # nobody speaks
    ],
)
def test_what_is_doubtful_at_the_end_is_decoded_again(
    monkeypatch: pytest.MonkeyPatch, said: list[str], logprobs: list[float], no_speech: float, given: str
) -> None:
    model = pair()[0]
    tokenizer = model_tokenizer(model, "en")
    temperatures: list[float] = []

    def decoded(model: object, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        i = min(len(temperatures), 2)
        temperatures.append(options.temperature)
        tokens = tokenizer.encode(said[i])
        ratio = 5.0 if said[i] == LOOP else 1.0
        made = DecodingResult(features, "en", None, tokens, said[i], logprobs[i], no_speech, options.temperature, ratio)
        return [replace(made, logprobs=[logprobs[i]] * len(tokens))]

    monkeypatch.setattr("dawhisper.serve.stream.decode_windows", decoded)
    stream = Stream(model, StreamOptions(language="en", step=5.0))
    assert stream.feed(0.1 * np.ones(16000 * 2, np.float32)).words == []  # more may come
    temperatures.clear()
    update = stream.finish()
    assert text_of(update.words) == given
    assert update.end_of_turn
    assert temperatures == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0][: len(temperatures)]
    assert all(len(w.logprobs or []) == len(w.tokens) > 0 for w in update.words)


def test_what_two_doubtful_texts_begin_with_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops, silence and what one text alone says are not shown; a likely text takes their place."""
    model = pair()[0]
    tokenizer = model_tokenizer(model, "en")
    heard = iter(
        [
            (SAID, -1.5, 0.1, ""),
            (" One two tree.", -1.2, 0.1, " One two"),
            (LOOP, -0.2, 0.1, " One two"),  # what was shown stays
            (LOOP, -1.5, 0.1, " One two"),
            (OTHER, -1.5, 0.9, " One two"),
            (OTHER, -1.5, 0.1, " One two"),
            (" Four six.", -1.5, 0.1, " Four"),
            (" Ten eleven.", -0.2, 0.1, " Ten eleven."),
            (OTHER, -1.5, 0.1, " Ten eleven."),
            (OTHER, -1.5, 0.1, " Ten eleven."),
        ]
    )
    shown: list[str] = []

    def decoded(model: object, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        said, logprob, no_speech, pending = next(heard)
        shown.append(pending)
        tokens, ratio = tokenizer.encode(said), 5.0 if said == LOOP else 1.0
        made = DecodingResult(features, "en", None, tokens, said, logprob, no_speech, 0.0, ratio)
        return [replace(made, logprobs=[logprob] * len(tokens))]

    monkeypatch.setattr(vad, "detector", lambda: vad.loudness)
    monkeypatch.setattr("dawhisper.serve.stream.decode_windows", decoded)
    stream = Stream(model, StreamOptions(language="en", policy="agreement"))
    for _ in range(10):
        update = stream.feed(0.1 * np.ones(16000, np.float32))
        assert update.words == []
        assert update.pending == shown[-1]
    assert len(shown) == 10


def test_a_pipe_that_is_ahead_comes_in_larger_pieces() -> None:
    def pieces() -> Iterator[np.ndarray]:
        for i in range(100):
            yield np.full(10, i, np.float32)
        raise AudioError("the pipe broke")

    taken = read_ahead(pieces())
    sizes, heard = [], []
    with pytest.raises(AudioError, match="broke"):
        for piece in taken:
            sizes.append(len(piece))
            heard.append(piece)
            time.sleep(0.01)
    np.testing.assert_array_equal(np.concatenate(heard), np.repeat(np.arange(100), 10))
    assert 100 <= max(sizes) <= 10 * (PIPE_BACKLOG + 2)


class Screen:
    """A terminal of one row's height that is long enough, as far as its codes are used."""

    def __init__(self, columns: int):
        self.rows, self.at, self.columns = [""], 0, columns

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        for code, moved, plain in re.findall(r"(\x1b\[(?:(\d*)D|\d*[Km]))|([^\x1b])", text):
            if code.endswith("K"):
                self.rows[-1] = self.rows[-1][: self.at]
            elif moved:
                self.at -= int(moved)
            elif plain == "\n":
                self.rows.append("")
                self.at = 0
            elif plain:
                self.rows[-1] = self.rows[-1][: self.at] + plain + self.rows[-1][self.at + 1 :]
                self.at += 1
                assert self.at < self.columns


def spoken(*words: str) -> list[LiveWord]:
    return [LiveWord(word, 0.0, 1.0, 1.0) for word in words]


def test_a_terminal_shows_pending_words_until_they_are_final() -> None:
    screen = Screen(20)
    show = Terminal(screen, 20).show  # type: ignore[arg-type]
    show(Update(pending=" Hello word"))
    assert screen.rows == ["Hello word"]
    hello, world = spoken(" Hello", " world.")
    show(Update([hello], " world. And what follows then"))
    assert screen.rows == ["Hello world. And wh"]
    show(Update([world, *spoken(" And")], " now", [closed(hello, world)]))
    assert screen.rows == ["Hello world.", "And now"]
    show(Update(spoken(" now", " something", " longer.")))
    assert screen.rows == ["Hello world.", "And now something", "longer."]
    show(Update(segments=[closed(*spoken(" And", " now", " something", " longer."))], end_of_turn=True))
    assert screen.rows[-2:] == ["longer.", ""]


def closed(*words: LiveWord) -> Segment:
    text = text_of(list(words))
    return Segment(0, 0, 0.0, 1.0, text, [], 0.0, 0.0, 1.0, 0.0, list(words))


def test_pcm_cut_in_the_middle_of_a_sample() -> None:
    class Pipe(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read(3)

    samples = np.arange(-5, 6, dtype="<i2") * 1000
    heard = np.concatenate(list(read_pcm(Pipe(samples.tobytes()), 1.0)))
    np.testing.assert_array_equal(heard * 32768, samples)


@pytest.mark.parametrize(
    "options", [{"policy": "luck"}, {"task": "dance"}, {"step": 0}, {"longest": 29}, {"language": "klingon"}]
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        StreamOptions(**options)  # type: ignore[arg-type]


def test_the_command_reads_a_pipe(tiny_en_path: Path, assets: Path) -> None:
    data = (load_audio(assets / "speech.opus") * 32767).astype("<i2").tobytes()
    command = [sys.executable, "-m", "dawhisper", "stream", "--input", "-", "--model", str(tiny_en_path), "--json"]
    done = subprocess.run([*command, "--device", "cpu"], input=data, capture_output=True, timeout=120, check=True)
    updates = [json.loads(line) for line in done.stdout.splitlines()]
    said = "".join(segment["text"] for update in updates for segment in update["segments"])
    assert "best establishments" in said and wrong_words(said) <= 4
    assert updates[-1]["end_of_turn"]


class Microphone:
    """sounddevice's InputStream, as far as it is used: a thread calls back with blocks of a recording."""

    def __init__(self, samples: np.ndarray, at_end: Callable[[], None], hurried: bool):
        self.samples, self.at_end, self.hurried = samples, at_end, hurried

    def open(
        self,
        rate: int,
        block: int,
        device: int | str | None,
        channels: int,
        callback: Callable[..., None],
        finished_callback: Callable[[], None],
    ) -> Microphone:
        if device == "broken":
            raise Broken("Invalid number of channels [PaErrorCode -9998]")
        if device == "none":
            raise ValueError("No input device matching 'none'")
        assert (rate, channels) == (16000, 1)
        self.block, self.callback, self.finished = block, callback, finished_callback
        self.thread = threading.Thread(target=self.play)
        return self

    def start(self) -> None:
        self.thread.start()
        if self.hurried:  # all is said before the program goes on
            self.thread.join()

    def play(self) -> None:
        with contextlib.suppress(Abort):
            for first in range(0, len(self.samples), self.block):
                data = self.samples[first : first + self.block, None].copy()
                self.callback(data, len(data), None, None)
                data[:] = np.nan  # the buffer is PortAudio's
            self.at_end()
        self.finished()

    def close(self) -> None:
        self.thread.join()


class Abort(Exception):
    pass


class Broken(Exception):
    pass


def plug_in(
    monkeypatch: pytest.MonkeyPatch,
    samples: np.ndarray,
    at_end: Callable[[], None] = lambda: None,
    hurried: bool = False,
) -> None:
    fake = ModuleType("sounddevice")
    opened = Microphone(samples, at_end, hurried).open
    vars(fake).update(InputStream=opened, PortAudioError=Broken, CallbackAbort=Abort)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)


def hear(*arguments: str) -> int:
    return main(["stream", "--device", "cpu", "--language", "en", *arguments])


@pytest.mark.parametrize("hurried", [False, True])
def test_the_microphone_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tiny_en_path: Path, assets: Path, capsys: pytest.CaptureFixture[str], hurried: bool
) -> None:
    before = signal.getsignal(signal.SIGINT)
    plug_in(monkeypatch, load_audio(assets / "speech.opus"), _thread.interrupt_main, hurried)
    assert hear("--model", str(tiny_en_path)) == 0
    out, err = capsys.readouterr()
    assert words_in(out).endswith("very best establishments") and wrong_words(out) <= 4
    assert "Ctrl-C" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_microphone_that_fails(
    monkeypatch: pytest.MonkeyPatch, tiny_en_path: Path, assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", str(tiny_en_path))
    plug_in(monkeypatch, load_audio(assets / "speech.opus"))
    assert hear(*model) == 1
    out, err = capsys.readouterr()
    assert words_in(out).endswith("very best establishments") and wrong_words(out) <= 4  # what was said before
    assert "the microphone has stopped" in err
    for device in ("broken", "none"):
        assert hear(*model, "--input_device", device) == 1
        assert "name another with --input_device" in capsys.readouterr().err.splitlines()[-1]
    plug_in(monkeypatch, np.zeros(16000, np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("dawhisper.serve.sources.MIC_BACKLOG", 0.0)
        assert hear(*model) == 1
    assert "0 s behind the microphone; use a smaller model" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert hear(*model) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_wrong_source_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--input", "a.wav"]) == 1
    assert capsys.readouterr().err.startswith("dawhisper: error: --input is mic or -")
