"""Quantize: the file is the model's, errors are those of the layers, and word errors come from evaluate."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import run
from helpers.models import DUALS, talkative, trained
from helpers.sound import noise, write_wav

from dawhisper import DualOptions, load_audio, load_model, log_mel_spectrogram, pad_or_trim, save_model
from dawhisper.checkpoint import OWN_MODEL
from dawhisper.model import Whisper
from dawhisper.tools.quantize import layer_errors, origin


@pytest.fixture(scope="module")
def dual() -> Whisper:
    return talkative(trained(DUALS["full"]), most=20)


@pytest.fixture(scope="module")
def mel() -> torch.Tensor:
    return log_mel_spectrogram(pad_or_trim(noise(3)))[None]


def test_an_exact_twin_has_no_error(dual: Whisper, mel: torch.Tensor) -> None:
    errors = layer_errors(dual, copy.deepcopy(dual), mel)
    assert all(e.weight == 0 and e.output == 0 for e in errors)


def test_the_layer_with_wrong_weights_is_named(dual: Whisper, mel: torch.Tensor) -> None:
    twin = copy.deepcopy(dual)
    layer = twin.decoder.blocks[1].secondary_attn.query
    with torch.no_grad():
        layer.weight.mul_(1.5)
        layer.bias.mul_(1.5)
    wrong = [e for e in layer_errors(dual, twin, mel) if e.output]
    [found] = wrong  # layers behind it get the exact model's inputs
    assert found.layer == "decoder.blocks.1.secondary_attn.query"
    assert found.weight == pytest.approx(0.5)
    assert found.output == pytest.approx(0.5)


def test_the_command(dual: Whisper, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(dual, tmp_path / "dual.safetensors", dtype="fp32")
    clips = [write_wav(tmp_path / f"{i}.wav", noise(1 + i)) for i in range(3)]
    lines = [json.dumps({"audio": c.name, "text": "one two", "language": "en", "duration": 1}) for c in clips]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    out = tmp_path / "new" / "small.safetensors"
    given = ["--audio", clips[0], "--manifest", tmp_path / "manifest.jsonl", "--kinds", "clean", "white", "--snr", 0]
    assert run("quantize", "--model", tmp_path / "dual.safetensors", "--out", out, *given) == 0
    assert "decoder.blocks" in capsys.readouterr().out
    assert out.stat().st_size < 0.3 * (tmp_path / "dual.safetensors").stat().st_size
    rows = list(csv.DictReader((tmp_path / "new" / "small.layers.csv").open()))
    assert {r["layer"] for r in rows} >= {"encoder.conv1", "encoder.blocks.0.attn.query", "decoder.blocks.0.gate.0"}
    assert all(0 < float(r["weight"]) < 0.02 for r in rows if ".gate." not in r["layer"])
    results = json.loads((tmp_path / "new" / "small.evaluation" / "results.json").read_text())
    assert list(results["models"]) == ["float", "int8"]
    assert len(results["hypotheses"]) == 2 * 3 * 2


def test_the_packages_model_keeps_its_recipe() -> None:
    assert origin(OWN_MODEL)["recipe"]["stages"]
    assert origin("base") == {"base_model": "base"}


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in [
        (["--out", tmp_path / "x.bin"], ".safetensors"),
        (["--out", tmp_path / "x.safetensors", "--noise", tmp_path], "give --manifest"),
        (["--out", tmp_path / "x.safetensors", "--model", "no.pt"], "no.pt"),
        (["--out", tmp_path / "x.safetensors", "--audio", "no.wav"], "no.wav"),
    ]:
        assert run("quantize", *given) == 1
        assert said in capsys.readouterr().err


def test_real_weights(tiny_en_path: Path, assets: Path, tmp_path: Path) -> None:
    model = load_model(tiny_en_path, device="cpu", dual=DualOptions())
    save_model(model, tmp_path / "int8.safetensors", dtype="int8")
    clip = log_mel_spectrogram(pad_or_trim(load_audio(assets / "speech.opus")))[None]
    errors = layer_errors(model, load_model(tmp_path / "int8.safetensors", device="cpu"), clip)
    assert max(e.output for e in errors) < 0.1
    quantised = load_model(tmp_path / "int8.safetensors", device="cpu", dtype="int8")
    [result] = quantised.decode(clip)  # type: ignore[operator]
    assert "practiced" in result.text
