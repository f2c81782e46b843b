"""Export: the graphs compute what the model does, whatever the sizes, and carry all of decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import QUICK, run
from helpers.models import DUALS, MULTILINGUAL, talkative, trained
from helpers.sound import noise, write_wav

from dawhisper import DualOptions, load_model, log_mel_spectrogram, pad_or_trim, save_model, transcribe
from dawhisper.decoding import DecodingOptions, decode_windows
from dawhisper.errors import CheckpointError, OptionError
from dawhisper.formats.onnx import load_onnx
from dawhisper.kv_cache import KVCache
from dawhisper.model import Whisper
from dawhisper.tools.export import DecoderGraph, EncoderGraph, export

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def dual() -> Whisper:
    return talkative(trained(DUALS["full"]), eot_bias=5.0)


@pytest.fixture(scope="module")
def stored(dual: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dual") / "dual.safetensors"
    save_model(dual, path, dtype="fp32")
    return path


@pytest.fixture(scope="module")
def exported(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp32")
    assert run("export", "--model", stored, "--out", folder) == 0
    return folder


@pytest.mark.parametrize("windows, group", [(1, 1), (3, 1), (2, 4)])
def test_every_size_gives_the_models_logits(dual: Whisper, exported: Path, windows: int, group: int) -> None:
    """Other sizes than those that the graphs were traced with: a prompt, a step, several tokens at once."""
    onnx = load_onnx(exported)
    mel = torch.randn(windows, 80, 300)
    tokens = torch.randint(0, 50000, (windows * group, 9))
    logits = []
    with torch.no_grad():
        for model in (dual, onnx):
            cache = KVCache(model.decoder, model.encode(mel))
            cache.repeat(group)
            parts = [model.decoder(tokens[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
            logits.append(torch.cat(parts, dim=1))
    assert logits[1].shape == (windows * group, 9, dual.dims.n_vocab)
    assert torch.allclose(*logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"without_timestamps": True}, {"prompt": "hello"}])
def test_decoding_gives_the_same_tokens(dual: Whisper, exported: Path, options: dict[str, object]) -> None:
    mel = torch.stack([log_mel_spectrogram(pad_or_trim(noise(s))) for s in (3.0, 20.0)])
    wanted = DecodingOptions(sample_len=20, **options)  # type: ignore[arg-type]
    results = [decode_windows(model, model.encode(mel), wanted) for model in (dual, load_onnx(exported))]
    ours, theirs = ([(r.tokens, r.language) for r in result] for result in results)
    assert ours == theirs
    assert ours[0][0] != ours[1][0]


def test_a_branch_without_extras(tmp_path: Path) -> None:
    """(A model of one branch is exported and run by what docs/transcribe.md says.)"""
    model = trained(DUALS["plain"], replace(MULTILINGUAL, n_audio_layer=1, n_text_layer=1))
    export(model, tmp_path)
    onnx = load_onnx(tmp_path)
    mel, tokens = torch.randn(1, 80, 200), torch.tensor([[50258, 50259, 50359]])
    with torch.no_grad():
        ours = model.decoder(tokens, model.encode(mel))
        theirs = onnx.decoder(tokens, cache=KVCache(onnx.decoder, onnx.encode(mel)))
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_int8_is_near_and_small(dual: Whisper, exported: Path, tmp_path: Path) -> None:
    export(dual, tmp_path, dtype="int8")
    sizes = [sum(f.stat().st_size for f in folder.glob("*.onnx")) for folder in (tmp_path, exported)]
    assert sizes[0] < 0.6 * sizes[1]  # the embedding, most of this model, is there twice
    mel, tokens = torch.randn(1, 80, 200), torch.randint(0, 50000, (1, 12))
    with torch.no_grad():
        exact, rough = (
            m.decoder(tokens, cache=KVCache(m.decoder, m.encode(mel)))
            for m in (load_onnx(exported), load_onnx(tmp_path))
        )
    error = (exact - rough).norm() / exact.norm()
    assert 0 < error < 0.1


def test_torch_programs(dual: Whisper, tmp_path: Path) -> None:
    export(dual, tmp_path, format="torch")
    encoder, decoder = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    mel, tokens = torch.randn(3, 80, 100), torch.randint(0, 50000, (3, 2, 7))
    h, e = dual.dims.n_text_head, dual.dims.n_text_state // dual.dims.n_text_head
    past = torch.randn(dual.dims.n_text_layer, 2, 3, 2, h, 6, e)
    with torch.no_grad():
        cross = EncoderGraph(dual)(mel)
        for given, wanted in zip(encoder(mel), cross):
            assert torch.allclose(given, wanted, atol=1e-4)
        for given, wanted in zip(decoder(tokens, past, *cross), DecoderGraph(dual)(tokens, past, *cross)):
            assert torch.allclose(given, wanted, atol=1e-3)


def test_a_model_of_the_other_commands(
    stored: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_wav(tmp_path / "clip.wav", noise(3))
    for model, folder in ((stored, "a"), (exported, "b")):
        given = ["--dtype", "fp32", "-o", tmp_path / folder, "-f", "json", *QUICK]
        assert run("transcribe", clip, "--model", model, *given) == 0
    ours, theirs = (json.loads((tmp_path / folder / "clip.json").read_text()) for folder in ("a", "b"))
    assert ours["text"] == theirs["text"]
    assert [s["tokens"] for s in ours["segments"]] == [s["tokens"] for s in theirs["segments"]]
    with pytest.raises(OptionError, match="give one front_end_mix"):  # its graph takes one spectrogram
        transcribe(load_onnx(exported), noise(3), front_end=np.zeros_like, front_end_mix="0,0.6", language="en")
    words = ["--word_timestamps", "True"]
    assert run("transcribe", clip, "--model", exported, "-o", tmp_path, *QUICK, *words) == 1
    assert "word times" in capsys.readouterr().err


def test_bad_input_is_one_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("encoder.onnx", "config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"decoder\.onnx: cannot be loaded"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)
    assert run("export", "--model", "nothing.pt", "--out", tmp_path) == 1
    assert "nothing.pt" in capsys.readouterr().err
    assert run("export", "--out", tmp_path, "--format", "torch", "--dtype", "int8") == 1
    assert "--format onnx" in capsys.readouterr().err


def test_real_clips(tiny_en_path: Path, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp16, the hardest in which no word may change."""
    model = tmp_path / "dual.safetensors"
    save_model(load_model(tiny_en_path, device="cpu", dtype="fp32", dual=DualOptions()), model, dtype="fp32")
    clips = [assets / name for name in ("speech.opus", "speech_noisy.opus")]
    assert run("export", "--model", model, "--out", tmp_path / "o", "--dtype", "fp16", "--check", *clips) == 0
    assert "same tokens as PyTorch in fp32 on 2 of 2 recordings" in capsys.readouterr().out
