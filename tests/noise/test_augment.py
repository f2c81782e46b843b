"""Mixing at a known SNR, determinism of every draw, and what each disturbance does to the sound."""

from __future__ import annotations

import dataclasses
import math
import sys
import wave
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dawhisper.errors import DataError, OptionError
from dawhisper.noise import augment as noise
from dawhisper.noise.augment import (
    KINDS,
    SPEEDS,
    Augment,
    AugmentOptions,
    NoiseBank,
    active_mask,
    active_power,
    add_noise,
    babble,
    band_limit,
    colored_noise,
    measure_snr,
    mu_law,
    reverberate,
    spec_augment,
    speed_changer,
    step_generator,
    telephone,
)

RATE = 16000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voices(batch: int = 6, n: int = 48000) -> tuple[Tensor, Tensor]:
    """Clips with words and pauses: tones of different pitch, switched on and off, of different lengths."""
    time = torch.arange(n) / RATE
    pitch = 120.0 + 60 * torch.arange(batch)[:, None]
    on = (torch.sin(2 * math.pi * (1.3 + 0.2 * torch.arange(batch)[:, None]) * time) > -0.3).float()
    lengths = torch.linspace(n, n // 3, batch).long()
    x = 0.2 * torch.sin(2 * math.pi * pitch * time) * on + 1e-5 * torch.sin(2 * math.pi * 50 * time)
    return x * (torch.arange(n) < lengths[:, None]), lengths


def bank(count: int = 5, seconds: float = 1.0, seed: int = 3) -> NoiseBank:
    rng = np.random.default_rng(seed)
    return NoiseBank([0.1 * rng.standard_normal(int(RATE * seconds * (1 + 0.3 * k))) for k in range(count)])


def rirs() -> NoiseBank:
    decay = np.exp(-np.arange(4000) / 600)
    rng = np.random.default_rng(5)
    clips = []
    for delay in (0, 37, 200):
        rir = 0.1 * rng.standard_normal(4000) * decay
        rir[:delay] *= 0.01
        rir[delay] = 0.9
        clips.append(rir)
    return NoiseBank(clips)


def reference_snr(speech: np.ndarray, noise: np.ndarray) -> float:
    """The definition, written again the slow way: 20 ms frames within 40 dB of the loudest."""
    frames = [slice(i, i + 320) for i in range(0, len(speech), 320)]
    power = [float(np.mean(speech[f].astype(np.float64) ** 2)) for f in frames]
    active = np.concatenate([np.arange(len(speech))[f] for f, p in zip(frames, power) if p > max(power) * 1e-4])
    return 10 * math.log10(np.mean(speech[active].astype(np.float64) ** 2) / np.mean(noise[active].astype(float) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise_reaches_the_snr_over_active_speech(kind: str) -> None:
    speech, lengths = voices()
    noise = {
        "real": lambda: bank().batch(len(speech), speech.shape[1], generator(1)),
        "babble": lambda: babble(speech, lengths, generator(1)),
        "white": lambda: colored_noise(speech.shape, 0, generator(1)),
        "pink": lambda: colored_noise(speech.shape, 1, generator(1)),
        "brown": lambda: colored_noise(speech.shape, 2, generator(1)),
    }[kind]()
    asked = torch.tensor([-10.0, -5.0, 0.0, 5.0, 20.0, 40.0])
    mixture, scaled = add_noise(speech, noise, asked, lengths)
    for i, n in enumerate(lengths.tolist()):
        measured = reference_snr(speech[i, :n].numpy(), scaled[i, :n].numpy())
        assert measured == pytest.approx(float(asked[i]), abs=0.1)
        assert not scaled[i, n:].any() and not mixture[i, n:].any()
    assert torch.equal(mixture, speech + scaled)
    assert torch.allclose(measure_snr(speech, scaled, lengths), asked, atol=0.01)


def test_pauses_do_not_count() -> None:
    speech, lengths = voices(1)
    padded = torch.cat([speech, torch.zeros(1, 64000)], dim=1)
    assert torch.allclose(active_power(padded, lengths + 64000), active_power(speech, lengths), rtol=1e-3)
    mask = active_mask(speech, lengths)
    assert 0.3 < mask.float().mean() < 0.9  # the pauses are left out, the words are not
    assert active_power(torch.zeros(1, 1000), torch.tensor([1000])) == 0


def test_add_noise_that_lies_in_the_pauses_is_not_raised_without_end() -> None:
    speech, lengths = voices(1)
    noise = torch.where(active_mask(speech, lengths), 0.0, 1.0) * colored_noise(speech.shape, 0, generator())
    _, scaled = add_noise(speech, noise, torch.tensor([0.0]), lengths)
    assert 0 < scaled.square().mean() <= 101 * active_power(speech, lengths)
    silent, nothing = add_noise(torch.zeros_like(speech), noise, torch.tensor([0.0]), lengths)
    assert not silent.any() and not nothing.any()
    _, none = add_noise(speech, torch.zeros_like(speech), torch.tensor([0.0]), lengths)
    assert not none.any() and measure_snr(speech, none, lengths)[0] == math.inf


@pytest.mark.parametrize("exponent, slope_db", [(0, 0.0), (1, -3.01), (2, -6.02)])
def test_coloured_noise_falls_by_its_slope_per_octave(exponent: float, slope_db: float) -> None:
    x = colored_noise((4, 2**17), exponent, generator())
    power = torch.fft.rfft(x).abs().square().mean(0)
    octaves = [10 * math.log10(power[2**k : 2 ** (k + 1)].mean()) for k in range(10, 16)]
    assert np.diff(octaves) == pytest.approx([slope_db] * 5, abs=0.4)
    assert torch.allclose(x.square().mean(-1), torch.ones(4), atol=1e-4)
    correlation = torch.corrcoef(x).triu(1).abs().max()
    assert correlation < 0.1  # rows are different noises


def test_white_noise_is_gaussian() -> None:
    x = colored_noise((400_000,), 0, generator()).double()
    assert abs(x.mean()) < 0.01 and abs((x**3).mean()) < 0.03 and abs((x**4).mean() - 3) < 0.06
    assert abs((x[1:] * x[:-1]).mean()) < 0.01


def test_babble_is_made_of_the_others_only() -> None:
    lengths = torch.full((4,), 8000)  # each clip is a tone: a spectrum tells what a babble is mixed from
    tones = torch.sin(2 * math.pi * torch.tensor([500.0, 1000.0, 1500.0, 2000.0])[:, None] * torch.arange(8000) / RATE)
    mixed = babble(tones, lengths, generator(), talkers=(3, 8))
    spectrum = torch.fft.rfft(mixed).abs()
    for i in range(4):
        at = [float(spectrum[i, hz // 2]) for hz in (500, 1000, 1500, 2000)]
        assert at[i] < 0.02 * max(at)
        assert sum(level > 0.1 * max(at) for level in at) >= 2
    assert torch.allclose(mixed.square().mean(-1), torch.ones(4), atol=1e-3)
    rows = torch.tensor([1, 3])
    assert torch.allclose(babble(tones, lengths, generator(), rows=rows), mixed[rows], atol=1e-5)
    with pytest.raises(OptionError, match="two clips"):
        babble(tones[:1], lengths[:1], generator())


def test_babble_of_a_bank_leaves_out_the_clip_itself() -> None:
    hz = (500, 1000, 1500)
    tones = NoiseBank([0.5 * np.sin(2 * np.pi * f * np.arange(8000) / RATE) for f in hz])
    mixed = tones.babble(3, 8000, generator(), talkers=(4, 6), exclude=[0, 1, None])
    spectrum = torch.fft.rfft(mixed).abs()
    for i in (0, 1):
        assert spectrum[i, hz[i] // 2] < 0.02 * spectrum[i].max()
    with pytest.raises(DataError, match="only recording"):
        NoiseBank([np.ones(100)]).batch(1, 10, generator(), exclude=[0])


def test_reverberation_keeps_time_and_energy() -> None:
    x, lengths = voices(3)
    delayed = torch.zeros(3, 500)
    delayed[:, 120] = 0.7  # a pure delay: the direct path goes back to time zero
    assert torch.allclose(reverberate(x, delayed), x, atol=1e-4)
    rir = rirs().responses(3, generator())
    wet = reverberate(x, rir, lengths)
    assert torch.allclose(wet.square().sum(-1), x.square().sum(-1), rtol=1e-3)
    assert (wet - x).abs().max() > 0.01
    assert all(not wet[i, n:].any() for i, n in enumerate(lengths.tolist()))
    noise = colored_noise((3, 16000), 0, generator())
    wet = reverberate(noise, rir)
    lag = torch.fft.irfft(torch.fft.rfft(wet) * torch.fft.rfft(noise).conj()).argmax(-1)
    assert not lag.any()


def test_band_limit_and_telephone() -> None:
    x = colored_noise((2, 32000), 0, generator())

    def power(y: Tensor, low: int, high: int) -> float:
        return float(torch.fft.rfft(y[0]).abs().square()[low * 2 : high * 2].mean())

    y = band_limit(x, 300.0, 3400.0)
    assert power(y, 400, 3300) == pytest.approx(power(x, 400, 3300), rel=1e-3)
    assert power(y, 0, 200) < 1e-6 * power(x, 0, 200) and power(y, 4000, 8000) < 1e-6 * power(x, 4000, 8000)
    each = band_limit(x, 0.0, torch.tensor([1000.0, 5000.0]))
    assert torch.fft.rfft(each).abs().square()[:, 4000:8000].mean(-1)[0] < 1e-6
    assert power(band_limit(x), 0, 8000) == pytest.approx(power(x, 0, 8000), rel=0.01)
    line = telephone(0.1 * x, generator())
    assert power(line, 4200, 8000) < 1e-5 * power(line, 400, 3300)


def test_mu_law_noise_is_that_of_8_bits() -> None:
    x = 0.3 * colored_noise((1, 100_000), 0, generator())
    error = mu_law(x, generator(1)) - x.clamp(-1, 1)
    snr = 10 * math.log10(x.clamp(-1, 1).square().mean() / error.square().mean())
    assert 36 < snr < 40  # G.711's well-known 38 dB


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


# ---- banks --------------------------------------------------------------------------------------------------------


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def test_bank_reads_folders_and_manifests_and_names_what_it_skips(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(np.arange(16000))
    (tmp_path / "sub").mkdir()
    write_wav(tmp_path / "a.wav", np.concatenate([tone, np.zeros(32000)]))
    write_wav(tmp_path / "sub" / "b.wav", tone)
    write_wav(tmp_path / "silent.wav", np.zeros(16000))
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    read = NoiseBank.from_manifest(tmp_path)
    assert [Path(n).name for n in read.names] == ["a.wav", "b.wav"]
    assert sorted(Path(name).name for name, _ in read.skipped) == ["broken.wav", "silent.wav"]
    assert read.lengths[0] <= 16320  # the padding is cut
    assert NoiseBank.from_manifest(tmp_path, trim_silence=False).lengths[0] == 48000
    (tmp_path / "m.jsonl").write_text('{"audio": "sub/b.wav"}\n{"audio": "gone.wav"}\n')
    listed = NoiseBank.from_manifest(tmp_path / "m.jsonl")
    assert len(listed) == 1 and len(listed.skipped) == 1
    (tmp_path / "p.jsonl").write_text('{"audio": "a.wav", "start": 0.25, "end": 0.75}\n')
    assert NoiseBank.from_manifest([tmp_path / "p.jsonl", tmp_path / "sub"]).lengths.tolist() == [8000, 16000]
    with pytest.raises(DataError, match="no readable audio"):
        NoiseBank.from_manifest(tmp_path / "broken.wav")
    with pytest.raises(DataError, match="no such file"):
        NoiseBank.from_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match="hours"):
        NoiseBank.from_manifest(tmp_path, max_hours=1e-5)


def test_bank_loops_short_recordings_and_repeats_with_the_generator() -> None:
    ramp = NoiseBank([np.arange(1, 101) / 200])
    drawn = ramp.sample(250, generator(4)) * 200
    step = drawn.diff().round()
    assert set(step.tolist()) <= {1.0, -99.0} and (step == -99).sum() >= 2
    assert torch.equal(bank().batch(4, 3000, generator(7)), bank().batch(4, 3000, generator(7)))
    assert not torch.equal(bank().batch(4, 3000, generator(7)), bank().batch(4, 3000, generator(8)))


# ---- Augment ------------------------------------------------------------------------------------------------------


EVERYTHING = AugmentOptions(
    second_noise_prob=0.4, noise_only_prob=0.2, reverb_prob=0.5, codec_prob=0.5, speed_prob=0.5, clip_prob=0.3
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
    assert kinds == {"clean", *KINDS}


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


def test_noise_without_any_kind_is_an_error() -> None:
    with pytest.raises(OptionError, match="give noise files"):
        Augment(AugmentOptions(babble=0, white=0, pink=0, brown=0))
    low, high = Augment(AugmentOptions(noise_level="high")).snr
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
