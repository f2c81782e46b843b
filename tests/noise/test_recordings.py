"""Banks of recordings: what they read, skip and draw."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.noise import RATE, bank, generator

from dawhisper.errors import DataError
from dawhisper.noise.recordings import NoiseBank


def test_babble_of_a_bank_leaves_out_the_clip_itself() -> None:
    hz = (500, 1000, 1500)
    tones = NoiseBank([0.5 * np.sin(2 * np.pi * f * np.arange(8000) / RATE) for f in hz])
    mixed = tones.babble(3, 8000, generator(), talkers=(4, 6), exclude=[0, 1, None])
    spectrum = torch.fft.rfft(mixed).abs()
    for i in (0, 1):
        assert spectrum[i, hz[i] // 2] < 0.02 * spectrum[i].max()
    with pytest.raises(DataError, match="only recording"):
        NoiseBank([np.ones(100)]).batch(1, 10, generator(), exclude=[0])


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


def test_recordings_are_played_at_the_asked_speed() -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)
    bank = NoiseBank([(0.5 * tone * 32767).astype(np.int16)])
    played = bank.batch(3, RATE, generator(), speeds=torch.tensor([1.0, 0.5, 1.5]))
    heights = torch.fft.rfft(played).abs().argmax(-1).tolist()
    assert heights == pytest.approx([500, 250, 750], abs=2)
    plain = bank.batch(3, RATE, generator())
    torch.testing.assert_close(played[0], plain[0], atol=1e-4, rtol=0)
