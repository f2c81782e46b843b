"""Manifests, shards, targets, the order of samples, and loaders that outlive bad data and restarts."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dawhisper.data.loader import Batch, Loader, follows, make_loader, silence_targets
from dawhisper.data.manifest import Report, Utterance, read_audio, read_manifest
from dawhisper.data.order import Order
from dawhisper.data.targets import IGNORE, TargetOptions, Targets, lower, styled_text, whisper_language
from dawhisper.errors import DataError, OptionError

RATE = 16000
PLAIN = TargetOptions(timestamps=0.0, prompt=0.0)


def write_wav(path: Path, seconds: float, seed: int = 0) -> None:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(RATE * seconds))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).clip(-32768, 32767).astype("<i2").tobytes())


def write_float_wav(path: Path, samples: np.ndarray) -> None:
    data = samples.astype("<f4").tobytes()
    head = b"fmt " + np.array([16], "<u4").tobytes() + np.array([3, 1], "<u2").tobytes()
    head += np.array([RATE, 4 * RATE], "<u4").tobytes() + np.array([4, 32], "<u2").tobytes()
    body = b"WAVE" + head + b"data" + np.array([len(data)], "<u4").tobytes() + data
    path.write_bytes(b"RIFF" + np.array([len(body)], "<u4").tobytes() + body)


def write_manifest(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 0.5 to 3 s, two speakers, each clip with its own text."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    lines = []
    for k in range(24):
        seconds = round(float(rng.uniform(0.5, 3)), 2)
        write_wav(folder / f"{k}.wav", seconds, k)
        speaker = f"s{k // 12}"
        lines.append(
            {"audio": f"{k}.wav", "duration": seconds, "text": f"clip {k}", "language": "en", "speaker": speaker}
        )
    write_manifest(folder / "manifest.jsonl", lines)
    return folder


def take(loader: Loader, count: int) -> list[Batch]:
    batches = list(itertools.islice(iter(loader), count))
    gc.collect()
    return batches


def same(a: Batch, b: Batch) -> bool:
    tensors = ("audio", "lengths", "tokens", "labels", "has_text", "sot", "begin")
    return a.utterances == b.utterances and all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)


# ---- manifests and shards -----------------------------------------------------------------------------------------


def test_manifest_paths_fields_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"audio": "a/b.wav", "duration": 2, "text": "Salam", "language": "az", "extra": 1}\n'
        "\n"
        '{"audio": "/x/y.wav", "duration": 1.5, "start": 0.5, "end": 2.0}\n'
        "{not json\n"
        '{"text": "no audio"}\n'
        '["a list"]\n'
    )
    report = Report()
    first, second = read_manifest(path, report)
    assert first == Utterance(str(tmp_path / "a" / "b.wav"), "Salam", 2.0, "az")
    assert (second.audio, second.start, second.text) == ("/x/y.wav", 0.5, None)
    assert [what.rpartition(":")[2] for what, _ in report] == ["4", "5", "6"]
    assert report.counts == {"not a manifest line": 3}
    report.write(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 3


def test_empty_and_missing_manifests_are_errors_at_once(tmp_path: Path) -> None:
    empty = write_manifest(tmp_path / "empty.jsonl", [])
    for call in (read_manifest, lambda p: make_loader(p, PLAIN, 2)):
        with pytest.raises(DataError, match="is empty"):
            call(empty)
        with pytest.raises(DataError, match="no such manifest"):
            call(tmp_path / "no.jsonl")
        with pytest.raises(DataError, match="name one of its manifests: empty"):
            call(tmp_path)
    textless = write_manifest(tmp_path / "t.jsonl", [{"audio": "a.wav", "duration": 2, "text": " "}])
    with pytest.raises(DataError, match="1 empty text"):
        make_loader(textless, TargetOptions(require_text=True), 2)


def test_damaged_audio_says_what_is_wrong(tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", 40)
    write_wav(tmp_path / "short.wav", 0.1)
    write_wav(tmp_path / "cut.wav", 2)
    write_float_wav(tmp_path / "nan.wav", np.where(np.arange(16000) == 5000, np.nan, 0.1 * np.sin(np.arange(16000))))
    write_float_wav(tmp_path / "loud.wav", np.sin(np.arange(16000) / 9) * 1.5)
    write_float_wav(tmp_path / "zeros.wav", np.zeros(16000))
    (tmp_path / "noise.wav").write_bytes(os.urandom(4000))
    for name, why in (
        ("long", "longer than 30 s: 40.0"),
        ("short", "shorter than 0.3 s"),
        ("cut", "cut off: 2.0 s of the 9.0 s"),
        ("nan", "NaN"),
        ("zeros", "silent"),
        ("noise", "does not decode"),
        ("gone", "missing file"),
    ):
        with pytest.raises(DataError, match=why):
            read_audio(Utterance(str(tmp_path / f"{name}.wav"), duration=9.0 if name == "cut" else 0.0))
    assert len(read_audio(Utterance(str(tmp_path / "loud.wav")))) == 16000  # clipped is not broken
    write_wav(tmp_path / "padded.wav", 30.04)
    assert len(read_audio(Utterance(str(tmp_path / "padded.wav")))) == 480000
    part = Utterance(str(tmp_path / "cut.wav"), start=0.5, end=1.25)
    assert len(read_audio(part)) == 12000


# ---- targets ------------------------------------------------------------------------------------------------------


def spell(target: Any, targets: Targets) -> str:
    return targets.tokenizer.decode_with_timestamps(target.tokens)


def test_target_layouts() -> None:
    u = Utterance("a", "Hello there.", 2.0, "en", teacher_text="Hello, there!")
    rng = np.random.default_rng
    plain = Targets(TargetOptions(timestamps=0, prompt=0))
    t = plain(u, 32000, rng(0))
    assert spell(t, plain) == "<|startoftranscript|><|en|><|transcribe|><|notimestamps|> Hello there."
    assert t.labels == [*t.tokens[1:], plain.tokenizer.eot]
    assert (t.sot, t.begin, t.has_text) == (0, 3, True)

    stamped = Targets(TargetOptions(timestamps=1, prompt=1))
    t = stamped(u, 32100, rng(0), Utterance("b", "Before.", 1.0, "en"))
    start = "<|startofprev|> Before.<|startoftranscript|><|en|><|transcribe|><|0.00|>"
    assert spell(t, stamped) == f"{start} Hello there.<|2.00|>"
    assert t.labels[: t.sot] == [IGNORE] * t.sot and t.labels[t.sot :] == [*t.tokens[t.sot + 1 :], plain.tokenizer.eot]
    assert t.tokens[t.sot] == plain.tokenizer.sot and t.tokens[t.begin] == plain.tokenizer.timestamp_begin

    taught = Targets(TargetOptions(timestamps=0, labels="teacher"))(u, 32000, rng(0))
    assert spell(taught, plain).endswith(" Hello, there!") and not taught.has_text
    english = Targets(TargetOptions(multilingual=False, timestamps=0))
    assert spell(english(u, 32000, rng(0)), english) == "<|startoftranscript|><|notimestamps|> Hello there."
    chinese = plain(Utterance("a", "你好", 1.0, "zh-CN"), 16000, rng(0))
    assert spell(chinese, plain) == "<|startoftranscript|><|zh|><|transcribe|><|notimestamps|>你好"


def test_utterances_without_a_usable_text_have_no_labels_or_the_teachers() -> None:
    plain = Targets(PLAIN)
    rng = np.random.default_rng(0)
    for u in (Utterance("a", None, 2.0, "en"), Utterance("a", " ", 2.0), Utterance("a", "Нас", 2.0, "ab")):
        t = plain(u, 32000, rng)
        assert set(t.labels) == {IGNORE} and len(t.tokens) == 4 and not t.has_text
    heard = Utterance("a", "Нас Иусуф", 2.0, "ab", teacher_text="Нас Юсуф.", teacher_language="ru")
    t = plain(heard, 32000, rng)
    assert spell(t, plain) == "<|startoftranscript|><|ru|><|transcribe|><|notimestamps|> Нас Юсуф." and not t.has_text
    english = Targets(TargetOptions(multilingual=False))
    assert set(english(Utterance("a", "Bonjour", 2.0, "fr"), 32000, rng).labels) == {IGNORE}


def test_too_long_texts_are_refused_and_prompts_are_cut() -> None:
    rng = np.random.default_rng(0)
    long = Utterance("a", "word " * 600, 20.0, "en")
    with pytest.raises(DataError, match="text too long"):
        Targets(PLAIN)(long, 320000, rng)
    edge = Utterance("a", "word " * 10, 5.0, "en")  # 10 tokens, an end and, in some draws, a time stamp
    for timestamps in (0, 1):
        with pytest.raises(DataError, match="12 tokens, more than 11"):
            Targets(TargetOptions(timestamps=timestamps, max_tokens=11))(edge, 80000, rng)
    prompted = Targets(TargetOptions(timestamps=0, prompt=1))
    for words in (3, 300, 430):
        t = prompted(Utterance("b", "word " * words, 20.0, "en"), 320000, rng, long)
        assert len(t.tokens) == len(t.labels) <= 448
        assert t.sot <= 224
        assert t.labels.count(prompted.tokenizer.eot) == 1


@pytest.mark.parametrize(
    "code, known",
    [("az", "az"), ("zh-CN", "zh"), ("Azerbaijani", "az"), ("sv-SE", "sv"), ("ab", None), ("rm-sursilv", None),
     (None, None), ("yue", None)],
)  # fmt: skip
def test_language_codes(code: str | None, known: str | None) -> None:
    assert whisper_language(code) == known
    assert whisper_language("yue", 100) == "yue"


def test_text_styles() -> None:
    loud = Utterance("a", "MISTER SMITH WENT HOME", 1.0, "en", teacher_text="Mr. Smith went home.")
    assert styled_text(loud, "keep", "en") == "MISTER SMITH WENT HOME"
    assert styled_text(loud, "lower", "en") == "mister smith went home"
    assert styled_text(loud, "teacher", "en") == "Mr. Smith went home."
    wrong = Utterance("a", "MISTER SMITH WENT HOME", 1.0, "en", teacher_text="Mr. Smithson went home.")
    assert styled_text(wrong, "teacher", "en") == "Mr. smith went home."
    assert styled_text(Utterance("a", "THE CAT", 1.0), "teacher", "en") == "the cat"
    assert styled_text(Utterance("a", "The Cat", 1.0, teacher_text="a dog"), "teacher", "en") == "The Cat"
    assert lower("İSTƏYİRƏM QIZ", "az") == "istəyirəm qız" and lower("IT IS", "en") == "it is"


def test_wrong_target_options() -> None:
    with pytest.raises(OptionError, match="text_style must be one of keep, lower, teacher"):
        TargetOptions(text_style="upper")
    with pytest.raises(OptionError, match="does not know the language 'ab'"):
        TargetOptions(language="ab")
    with pytest.raises(OptionError, match="share between 0 and 1"):
        TargetOptions(timestamps=2)


def test_silence_targets_and_retiming(corpus: Path) -> None:
    for share in (0.0, 1.0):
        batch = take(make_loader(corpus, TargetOptions(timestamps=share, prompt=1.0), 6, workers=0), 1)[0]
        mask = torch.tensor([True, False] * 3)
        silent = silence_targets(batch, mask)
        assert torch.equal(silent.tokens[~mask], batch.tokens[~mask])
        assert torch.equal(silent.labels[~mask], batch.labels[~mask])
        for i in mask.nonzero().flatten().tolist():
            sot, begin = int(batch.sot[i]), int(batch.begin[i])
            assert torch.equal(silent.tokens[i, : begin + 1], batch.tokens[i, : begin + 1])
            assert (silent.tokens[i, begin + 1 :] == batch.eot).all()
            expected = torch.full_like(silent.labels[i], IGNORE)
            expected[sot], expected[begin] = batch.no_speech, batch.eot
            expected[begin - 1] = batch.labels[i, begin - 1]  # time stamps or not
            assert torch.equal(silent.labels[i], expected)
        assert silent.has_text.all()
        faster = batch.retimed((batch.lengths / 1.1).long())
        stamps = faster.labels[faster.labels > batch.timestamp_begin] - batch.timestamp_begin
        assert stamps.tolist() == ([round(n / 1.1 / 320) for n in batch.lengths.tolist()] if share else [])
        assert (faster.tokens != batch.tokens).sum() == (faster.labels != batch.labels).sum() <= 6


# ---- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, block", [(100, 8), (7, 8), (1000, 32), (64, 8), (3, 1)])
def test_order_holds_each_sample_once_an_epoch_and_repeats(n: int, block: int) -> None:
    durations = np.random.default_rng(0).uniform(0.3, 30, n)
    order, again = Order(durations, 5, block), Order(durations, 5, block)
    epochs = [order.take(e * n, n) for e in range(4)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert again.take(2 * n, n) == epochs[2]  # without having gone through the first ones
    assert order.take(n - 2, 4) == epochs[0][-2:] + (epochs[1] + epochs[2])[:2]
    if n > 50:
        assert len({tuple(e) for e in epochs}) == 4
        assert Order(durations, 6, block).take(0, n) != epochs[0]
    assert Order(durations, 5, block, shuffle=False).take(n, n) == list(range(n))


def test_buckets_bound_the_padding() -> None:
    durations = np.random.default_rng(0).gamma(2.0, 4.0, 5000).clip(0.3, 30)

    def padding(bucket: bool) -> float:
        order, batch = Order(durations, 0, 32, bucket=bucket), 32
        real = padded = 0.0
        for k in range(450):  # almost three epochs: blocks must stay in step with the batches
            lengths = durations[order.take(k * batch, batch)]
            real, padded = real + lengths.sum(), padded + batch * lengths.max()
        return 1 - real / padded

    assert padding(True) < 0.08 < 0.5 < padding(False)


# ---- loaders ------------------------------------------------------------------------------------------------------


def test_workers_memory_and_none_give_the_same_batches(corpus: Path) -> None:
    options = TargetOptions(prompt=0.5)
    runs = [
        take(make_loader(corpus, options, 4, seed=3, **how), 9)  # type: ignore[arg-type]
        for how in ({"workers": 0}, {"workers": 2}, {"in_memory": True})
    ]
    for a, b, c in zip(*runs):
        assert same(a, b) and same(a, c)
        assert a.audio.shape[1] % 8000 == 0 and a.audio.dtype == torch.float32
        for row, n, u in zip(a.audio, a.lengths.tolist(), a.utterances):
            assert n == round(u.duration * RATE) and not row[n:].any()
            assert np.array_equal((row[:n] * 32768).numpy().astype(np.int16), read_audio(u))
    assert not multiprocessing.active_children()


def test_prompts_come_from_the_utterance_before(corpus: Path) -> None:
    loader = make_loader(corpus, TargetOptions(prompt=1.0), 4, workers=0)
    tokenizer = Targets(PLAIN).tokenizer
    for batch in take(loader, 6):
        for i, u in enumerate(batch.utterances):
            number = int(Path(u.audio).stem)
            said = tokenizer.decode([t for t in batch.tokens[i, : int(batch.sot[i])].tolist() if t < tokenizer.eot])
            assert said.strip() == ("" if number in (0, 12) else f"clip {number - 1}")
    one, two = Utterance("f", "a", 1.0, start=0.0, end=1.0), Utterance("f", "b", 1.0, start=1.0, end=2.0)
    assert follows(one, two) and not follows(two, one) and not follows(Utterance("f"), Utterance("g"))


def test_resume_goes_on_bit_for_bit(corpus: Path) -> None:
    options = TargetOptions()
    whole = take(make_loader(corpus, options, 5, seed=1, workers=0), 12)
    first = make_loader(corpus, options, 5, seed=1, workers=2)
    take(first, 7)  # the workers were ahead of this
    state = json.loads(json.dumps(first.state_dict()))
    assert (state["position"], state["epoch"]) == (35, 1)
    second = make_loader(corpus, options, 5, seed=99, workers=2)
    second.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(take(second, 5), whole[7:]))


def test_ranks_share_the_stream_and_resume_in_another_number(corpus: Path) -> None:
    def names(batches: list[Batch]) -> list[str]:
        return [u.audio for b in batches for u in b.utterances]

    alone = make_loader(corpus, PLAIN, 6, seed=2, workers=0)
    whole = take(alone, 8)
    pair = [make_loader(corpus, PLAIN, 3, seed=2, rank=r, world_size=2, workers=0) for r in (0, 1)]
    halves = [take(loader, 4) for loader in pair]
    assert [names([a]) + names([b]) for a, b in zip(*halves)] == [names([b]) for b in whole[:4]]
    rest = make_loader(corpus, PLAIN, 6, seed=2, workers=0)
    rest.load_state_dict(pair[0].state_dict())
    assert all(same(a, b) for a, b in zip(take(rest, 4), whole[4:]))
    third = make_loader(corpus, PLAIN, 2, rank=1, world_size=3, workers=0)
    third.load_state_dict(pair[1].state_dict())
    assert names(take(third, 1)) == names(whole[4:5])[2:4]


def test_bad_items_are_skipped_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "good.wav", 1.0)
    write_wav(tmp_path / "secretly_long.wav", 40)
    write_float_wav(tmp_path / "nan.wav", np.full(16000, np.nan))
    (tmp_path / "junk.wav").write_bytes(b"RIFFjunk")
    (tmp_path / "shard.tar").write_bytes(b"x" * 700)
    lines: list[dict[str, Any]] = [
        {"audio": "good.wav", "duration": 1, "text": f"good {k}", "start": 0, "end": 0.5 + k / 9} for k in range(5)
    ]
    lines += [
        {"audio": "secretly_long.wav", "duration": 1, "text": "x"},
        {"audio": "nan.wav", "duration": 1, "text": "x"},
    ]
    lines += [{"audio": "gone.wav", "duration": 1, "text": "x"}, {"audio": "junk.wav", "duration": 1, "text": "x"}]
    lines += [{"audio": "good.wav", "duration": 40, "text": "x"}, {"audio": "good.wav", "duration": 1, "text": ""}]
    lines += [{"audio": "shard.tar", "offset": 512, "size": 500, "duration": 1, "text": "x"}, {"audio": "gone.wav"}]
    lines += [{"audio": "good.wav", "duration": 1, "text": "long " * 500}]
    for line in lines:
        line.setdefault("language", "en")
    path = write_manifest(tmp_path / "m.jsonl", lines)
    for how in ({"workers": 0}, {"workers": 2}, {"in_memory": True}):
        loader = make_loader(path, TargetOptions(require_text=True), 4, **how)  # type: ignore[arg-type]
        for batch in take(loader, 8):
            assert len(batch.utterances) == 4
            assert all("good" in (u.text or "") for u in batch.utterances)
        found = {(Path(what).name, why.split(":")[0]) for what, why in loader.report}
        assert found == {
            ("secretly_long.wav", "longer than 30 s"),
            ("good.wav", "longer than 30 s"),
            ("good.wav", "empty text"),
            ("good.wav", "text too long"),
            ("nan.wav", "NaN audio"),
            ("gone.wav", "missing file"),
            ("gone.wav", "empty text"),
            ("junk.wav", "does not decode"),
            ("shard.tar@512", "does not decode"),
        }
        assert loader.report.counts["longer than 30 s"] == 2


def test_nothing_but_bad_items_stops_with_their_names(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": f"{k}.wav", "duration": 1} for k in range(20)])
    with pytest.raises(DataError, match=r"not one clip .*missing file"):
        take(make_loader(path, PLAIN, 4, workers=0), 1)
    with pytest.raises(DataError, match="20 missing file"):
        make_loader(path, PLAIN, 4, in_memory=True)


def test_durations_that_a_manifest_leaves_out_are_read(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 1.5)
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    assert make_loader(path, PLAIN, 1).utterances[0].duration == pytest.approx(1.5, abs=0.01)


def test_workers_end_with_the_loop(corpus: Path) -> None:
    loader = make_loader(corpus, PLAIN, 4, workers=2)
    with pytest.raises(KeyboardInterrupt):
        for _ in loader:
            assert len(multiprocessing.active_children()) == 2
            raise KeyboardInterrupt
    gc.collect()
    until = time.time() + 10
    while multiprocessing.active_children() and time.time() < until:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_changed_data_restarts_the_epoch(corpus: Path) -> None:
    loader = make_loader(corpus, PLAIN, 4, workers=0)
    with pytest.warns(UserWarning, match="has changed"):
        loader.load_state_dict({"position": 70, "epoch": 2, "seed": 0, "block": 4, "samples": 30})
    assert loader.position == 48 and loader.epoch == 2


def test_out_of_range_options(corpus: Path) -> None:
    for wrong in ({"batch_size": 0}, {"batch_size": 2, "rank": 1}, {"batch_size": 2, "workers": -1}):
        with pytest.raises(OptionError):
            make_loader(corpus, PLAIN, **wrong)
