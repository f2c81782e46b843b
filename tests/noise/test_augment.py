"""What training does to a batch: every draw depends on the step alone, and the mixture says truly what is in it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.noise import RATE, bank, generator, rirs, torchaudio_loads, voices

from dawhisper.errors import OptionError
from dawhisper.evaluation.conditions import conditions
from dawhisper.noise import augment as noise
from dawhisper.noise.augment import NOISE_KINDS, SPEEDS, Augment, AugmentOptions, spec_augment, speed_changer
from dawhisper.noise.random_numbers import step_generator
from dawhisper.noise.recordings import NoiseBank
from tests.noise.test_mixing import reference_snr


def test_spec_augment_masks_within_its_bounds() -> None:
    mel = torch.rand(8, 80, 500) + 1
    frames = torch.tensor([500, 400, 300, 200, 100, 50, 20, 5])
    out = spec_augment(mel, generator(), 2, 15, 2, 70, 0.1, frames)
    changed = out != mel
    assert changed.any() and torch.equal(out[~changed], mel[~changed])
    rows, columns = changed.all(2), changed.all(1)
    assert (rows.sum(1) <= 30).all()
    assert (columns.sum(1) <= 2 * (frames * 0.1).floor().clamp(max=70)).all()
    for i, n in enumerate(frames.tolist()):
        assert not columns[i, n:].any()
    assert torch.equal(out, spec_augment(mel, generator(), 2, 15, 2, 70, 0.1, frames))
    assert torch.equal(spec_augment(mel, generator(), 0, 15, 0, 70), mel)


# ---- Augment ------------------------------------------------------------------------------------------------------


EVERYTHING = AugmentOptions(
    second_noise_prob=0.4,
    noise_only_prob=0.2,
    reverb_prob=0.5,
    codec_prob=0.5,
    speed_prob=0.5 * torchaudio_loads(),
    clip_prob=0.3,
    shaped=0.2,
    vary_prob=0.5,
    noise_room_prob=0.4,
)


def augment(options: AugmentOptions = EVERYTHING, seed: int = 0, rank: int = 0) -> Augment:
    return Augment(options, bank(), rirs(), seed, rank)


def test_a_step_depends_on_seed_rank_and_step_alone() -> None:
    speech, lengths = voices()
    one, other = augment(), augment()
    for step in (3, 0):  # in another order, after other steps
        other(speech, lengths, step)
    first, again = one(speech, lengths, 2), other(speech, lengths, 2)
    for name in ("audio", "clean", "noise", "snr_db", "lengths"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert first.kind == again.kind
    for different in (augment(rank=1), augment(seed=1)):
        assert not torch.equal(different(speech, lengths, 2).snr_db, first.snr_db)
    assert not torch.equal(one(speech, lengths, 3).snr_db, first.snr_db)
    states = {tuple(step_generator(s, r, k, t).get_state()[:64].tolist()) for s, r, k, t in np.ndindex(3, 3, 3, 2)}
    assert len(states) == 54


def test_mixture_says_truly_what_is_in_it() -> None:
    speech, lengths = voices()
    kinds: set[str] = set()
    for step in range(12):
        m = augment()(speech, lengths, step)
        kinds |= {k for name in m.kind for k in name.split("+")}
        for i, n in enumerate(m.lengths.tolist()):
            assert not m.audio[i, n:].any() and not m.noise[i, n:].any() and not m.clean[i, n:].any()
            if m.noise_only[i]:
                assert not m.clean[i].any() and m.noise[i].any() and m.audio[i].any()
            elif m.kind[i] == "clean":
                assert m.snr_db[i] == math.inf and not m.noise[i].any()
            else:
                real = reference_snr(m.clean[i, :n].numpy(), m.noise[i, :n].numpy())
                assert real == pytest.approx(float(m.snr_db[i]), abs=0.1)
        assert torch.isfinite(m.audio).all()
    assert kinds == {"clean", *NOISE_KINDS}


def test_plain_noise_is_clean_plus_noise_in_the_asked_range() -> None:
    speech, lengths = voices()
    options = dataclasses.replace(AugmentOptions.off(), noise_prob=1.0, clean_prob=0.0, mild_prob=0.0, snr=(3.0, 6.0))
    changing = Augment(options, bank())
    for step in range(5):
        m = changing(speech, lengths, step)
        assert torch.allclose(m.audio, m.clean + m.noise, atol=1e-6)
        assert torch.equal(m.clean, speech)
        assert ((m.snr_db > 2.9) & (m.snr_db < 6.1)).all()
    changing.snr = (-20.0, -20.0)  # a curriculum
    resumed = Augment(options, bank())
    resumed.load_state_dict(changing.state_dict())
    assert torch.allclose(resumed(speech, lengths, 1).snr_db, torch.full((6,), -20.0), atol=0.1)


def test_cleaned_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The asked share of the clips is heard through DeepFilterNet, in part; what is drawn for all else stays."""
    options = dataclasses.replace(EVERYTHING, cleaned_prob=0.5, cleaned_mix=(0.6, 0.6))
    monkeypatch.setattr(noise, "load_deepfilternet", lambda device="cpu": lambda x, span: x + 2)
    monkeypatch.setattr(noise, "weights_path", lambda: None)
    audio, lengths = voices(64)
    plain, cleaned = augment()(audio, lengths, 3), augment(options)(audio, lengths, 3)
    added = cleaned.audio - plain.audio
    heard = torch.arange(added.shape[1]) < cleaned.lengths[:, None]
    chosen = added[:, 0] > 1
    assert 20 < chosen.sum() < 44
    torch.testing.assert_close(added[~chosen], torch.zeros_like(added[~chosen]))
    torch.testing.assert_close(added[chosen][heard[chosen]], torch.tensor(1.2).expand(int(heard[chosen].sum())))
    assert torch.equal(cleaned.clean, plain.clean) and torch.equal(cleaned.snr_db, plain.snr_db)
    assert cleaned.second is None
    apart = augment(dataclasses.replace(options, cleaned_apart=0.5))(audio, lengths, 3)
    assert apart.second is not None and torch.equal(apart.second, cleaned.audio)  # what the secondary branch hears
    alone = ~(apart.audio == cleaned.audio).all(1)
    assert 5 < alone.sum() < chosen.sum() and torch.equal(apart.audio[alone], plain.audio[alone])


def test_off_and_clean_leave_the_audio_untouched() -> None:
    speech, lengths = voices()
    for options in (AugmentOptions.off(), dataclasses.replace(EVERYTHING, clean_prob=1.0, noise_only_prob=0.0)):
        m = augment(options)(speech, lengths, 0)
        assert torch.equal(m.audio, speech) and torch.equal(m.lengths, lengths)
        assert m.kind == ["clean"] * 6 and (m.snr_db == math.inf).all()


def test_shares_are_the_asked_ones() -> None:
    speech, lengths = voices(50, 1600)
    options = dataclasses.replace(AugmentOptions.off(), noise_prob=0.6, clean_prob=0.2, noise_only_prob=0.1)
    changing = Augment(options, bank())
    mixtures = [changing(speech, lengths, step) for step in range(20)]
    n = 1000
    only = sum(int(m.noise_only.sum()) for m in mixtures)
    clean = sum(kind == "clean" for m in mixtures for kind in m.kind)
    assert only / n == pytest.approx(0.1, abs=0.03)
    assert clean / n == pytest.approx((1 - 0.8 * 0.6) * 0.9, abs=0.05)


@pytest.mark.skipif(not torchaudio_loads(), reason="this torchaudio does not load beside this torch: docs/install.md")
def test_speed_changes_length_and_pitch_together() -> None:
    n = 16000
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(n) / RATE).repeat(16, 1)
    m = Augment(dataclasses.replace(AugmentOptions.off(), speed_prob=1.0, clean_prob=0.0))(
        tone, torch.full((16,), n), 0
    )
    assert len(set(m.lengths.tolist())) > 1
    for row, length in zip(m.audio, m.lengths.tolist()):
        speed = n / length
        assert min(abs(speed - s) for s in (0.9, 0.95, 1.05, 1.1)) < 1e-3
        peak = torch.fft.rfft(row[:length]).abs().argmax().item() * RATE / length
        assert peak == pytest.approx(1000 * speed, abs=2)
    full = Augment(dataclasses.replace(AugmentOptions.off(), speed_prob=1.0, clean_prob=0.0))
    longest = full(torch.rand(4, 480000), torch.full((4,), 480000), 0)
    assert longest.audio.shape[1] <= 480000  # never beyond Whisper's window


@pytest.fixture
def fresh_torchaudio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchaudio is imported anew, and what came of it is forgotten afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    speed_changer.cache_clear()
    yield
    speed_changer.cache_clear()


@pytest.mark.usefixtures("fresh_torchaudio")
def test_a_torchaudio_that_does_not_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError('libtorchaudio.so: undefined symbol: torch_exception')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError) as caught:
        Augment()
    message = str(caught.value)
    assert "\n" not in message and "undefined symbol" in message and f"torch {torch.__version__}" in message
    assert "pip install torch==" in message
    assert Augment(dataclasses.replace(AugmentOptions(), speed_prob=0.0))(*voices(), 0).audio.any()


@pytest.mark.usefixtures("fresh_torchaudio")
def test_a_missing_torchaudio_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setattr(noise, "version", version)
    with pytest.raises(OptionError, match=r"not installed: pip install 'dawhisper\[train\]'"):
        Augment()


def test_babble_from_the_batch_needs_company_and_other_kinds_take_over() -> None:
    speech, lengths = voices(1)
    options = dataclasses.replace(AugmentOptions.off(), noise_prob=1.0, clean_prob=0.0, white=0.5)
    assert Augment(options)(speech, lengths, 0).kind[0] in ("white", "pink", "brown")
    only = dataclasses.replace(options, real=0.0, babble=1.0, white=0.0, pink=0.0, brown=0.0)
    assert Augment(only)(speech, lengths, 0).kind == ["clean"]  # nothing to babble with
    assert Augment(only, speech=bank())(speech, lengths, 0).kind == ["babble"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"noise_level": "loud"}, "noise_level must be one of low, medium, high"),
        ({"noise_prob": 1.5}, "noise_prob must lie between 0 and 1"),
        ({"white": -1.0}, "can't be negative"),
        ({"snr": (5.0, 0.0)}, "two numbers in order"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AugmentOptions(**wrong)  # type: ignore[arg-type]


def test_each_kind_has_a_weight_and_a_condition() -> None:
    assert set(NOISE_KINDS) <= {field.name for field in dataclasses.fields(AugmentOptions)}
    assert {condition.kind for condition in conditions(NOISE_KINDS, [0.0])} == set(NOISE_KINDS)


def test_noise_without_any_kind_is_an_error() -> None:
    with pytest.raises(OptionError, match="give noise files"):
        Augment(AugmentOptions(babble=0, white=0, pink=0, brown=0))
    low, high = Augment(AugmentOptions(noise_level="high", speed_prob=0)).snr
    assert (low, high) == (-5.0, 10.0)


def on_gpu() -> Augment:
    """What `augment` makes, with its recordings on a GPU."""
    banks = (
        NoiseBank([b.data[o : o + n].numpy() for o, n in zip(b.offsets.tolist(), b.lengths.tolist())], "cuda")
        for b in (bank(), rirs())
    )
    return Augment(EVERYTHING, *banks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_the_mixtures_of_the_cpu() -> None:
    speech, lengths = voices()
    gpu = on_gpu()
    for step in range(10):
        a, b = augment()(speech, lengths, step), gpu(speech.cuda(), lengths.cuda(), step)
        assert a.kind == b.kind and torch.equal(a.lengths, b.lengths.cpu())
        for name in ("audio", "clean", "noise"):
            assert (getattr(a, name) - getattr(b, name).cpu()).abs().max() < 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_augmentation_never_waits_for_the_device() -> None:
    speech, lengths = (x.cuda() for x in voices())
    gpu = on_gpu()
    for speed in SPEEDS:  # a speed's filter is made once, and waits
        speed_changer(speed, speech.device)
    gpu(speech, lengths, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(10):
            gpu(speech, lengths, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
