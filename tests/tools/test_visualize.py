"""Visualize: what is recorded is what the model computes, and the files say it."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import run
from helpers.models import DUALS, pair, talkative, trained
from helpers.sound import noise, write_wav
from whisper.audio import mel_filters

from dawhisper import DualOptions, load_audio, load_model, save_model
from dawhisper.audio import log_mel_spectrogram, pad_or_trim
from dawhisper.decoding import model_tokenizer
from dawhisper.errors import AudioError, OptionError
from dawhisper.model import Whisper
from dawhisper.tools.view import View, changed_words, notes, pitches
from dawhisper.tools.view_figures import draw_gates, draw_views
from dawhisper.tools.visualize import VisualizeOptions, look, mixed_at, n_positions, noise_share, view_values
from dawhisper.trace import Trace

TEXT = "one two, three four"


@pytest.fixture(scope="module")
def dual() -> Whisper:
    return talkative(trained(DUALS["full"]))


@pytest.fixture(scope="module")
def model(dual: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "dual.safetensors"
    save_model(dual, path, dtype="fp32")
    return path


def options(**changes: object) -> VisualizeOptions:
    return VisualizeOptions(**({"audio": "x.wav", "text": TEXT, "language": "en"} | changes))  # type: ignore[arg-type]


def seen(model: Whisper, **changes: object) -> View:
    return look(model, noise(2.5), "clip", options(**changes))


def test_words_and_maps_fit(dual: Whisper) -> None:
    view = seen(dual)
    assert [w.word for w in view.words] == ["one", "two,", "three", "four"]
    assert view.text == TEXT
    assert view.primary.shape == view.secondary.shape == (4, 125)  # type: ignore[union-attr]
    assert view.gate.shape == (4, dual.dims.n_text_layer)  # type: ignore[union-attr]
    assert view.spectrogram.shape == (80, 250)
    assert torch.allclose(view.primary.sum(dim=1), torch.ones(4))


def test_the_gate_is_that_of_the_position_that_writes_the_word(dual: Whisper) -> None:
    view = seen(dual)
    tokenizer = model_tokenizer(dual, "en", "transcribe")
    text = tokenizer.encode(" " + TEXT)
    start = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
    mel = log_mel_spectrogram(pad_or_trim(noise(2.5), 480_000))
    trace = Trace()
    with torch.no_grad():
        dual(mel[None], torch.tensor([start + text]), trace)
    gates = torch.stack([trace.gate[i][0] for i in range(dual.dims.n_text_layer)], dim=1)
    assert torch.allclose(view.gate[0], gates[len(start) - 1], atol=1e-5)  # type: ignore[index]  # " one" is one token
    both = gates[len(start) : len(start) + 2]  # " two" and ","
    assert torch.allclose(view.gate[1], both.mean(dim=0), atol=1e-5)  # type: ignore[index]


def test_layers_are_chosen(dual: Whisper) -> None:
    first, last, mean = (seen(dual, layers=layers).primary for layers in ([0], [1], [0, 1]))
    assert not torch.allclose(first, last)
    assert torch.allclose((first + last) / 2, mean, atol=1e-6)
    assert torch.equal(seen(dual).primary, last)
    with pytest.raises(OptionError, match="layers 0 to 1"):
        seen(dual, layers=[2])


def test_a_single_branch_has_one_map(dual: Whisper) -> None:
    view = seen(pair()[0])
    assert view.secondary is None
    assert view.gate is None
    assert len(draw_views([view], "stock").axes) < len(draw_views([seen(dual)], "dual").axes)


def test_noise_is_found_where_it_was_put() -> None:
    speech, burst = 0.1 * noise(2.0), np.zeros(32000, np.float32)
    burst[8000:16000] = 1.0  # 0.5 to 1 s
    share = noise_share(speech, burst)
    assert len(share) == n_positions(32000) == 100
    assert (share[25:50] > 0.5).all()
    assert (share[:25] < 0.5).all()
    assert (share[50:] < 0.5).all()
    attention = torch.zeros(1, 100)
    attention[0, 20:30] = 0.1
    view = View("", "", "en", 2.0, torch.zeros(80, 200), [], attention, noise=share)
    assert view.on_noise(attention) == pytest.approx(0.5)


def test_words_heard_otherwise_are_marked(dual: Whisper) -> None:
    clean = seen(dual)
    noisy = seen(dual, text="One too, three and four.")
    assert changed_words(noisy, clean) == {1, 3}
    assert not changed_words(clean, clean)
    first, second = view_values([clean, noisy], "m")["views"]
    assert [w["changed"] for w in second["words"]] == [False, True, False, True, False]
    assert not any(w["changed"] for w in first["words"])
    panels = draw_views([clean, noisy], "m").axes
    red = [t.get_text() for a in panels for t in a.get_yticklabels() if t.get_color() == "#c8102e"]
    assert red == ["too,", "and"] * 3  # beside both maps and their difference


def test_panels_have_their_labels(dual: Whisper) -> None:
    """The gate first, the spectrogram in kHz, both maps and their difference."""
    clean, noisy = seen(dual), seen(dual, text="One too")
    panels = draw_views([clean, noisy], "m").axes
    titles = [axes.get_title(loc="left").splitlines()[-1] for axes in panels if axes.get_title(loc="left")]
    assert [title.split(":")[0] for title in titles[::2]] == ["Gate", "Primary branch", "Second branch", "Difference"]
    assert "in red what is heard otherwise" in panels[1].get_title(loc="left")
    assert "in red" not in panels[0].get_title(loc="left")
    kilohertz = next(axes for axes in panels if "kHz" in axes.get_ylabel())
    assert [t.get_text() for t in kilohertz.get_yticklabels()] == ["0", "0.5", "1", "2", "4", "8"]
    [difference] = panels[8].images
    assert difference.get_array().min() < 0 < difference.get_array().max()
    assert notes([clean]) == []
    untrained = replace(clean, secondary=clean.primary, gate=torch.full((4, 2), 0.8))
    assert "untrained" in notes([untrained])[0]


def test_pitches_are_whispers() -> None:
    """The band of a pitch is the one whose filter hears it most."""
    filters = mel_filters("cpu", 80).numpy()
    for kilohertz, band in pitches(80)[1:-1]:
        loudest = filters[:, round(1000 * kilohertz / 40)].argmax()
        assert abs(loudest + 0.5 - band) <= 1


def test_the_gate_alone(dual: Whisper) -> None:
    figure = draw_gates([seen(dual), seen(dual, text="One too")])
    first, second, scale = figure.axes
    for axes in (first, second):
        assert [len(image.get_array()) for image in axes.images] == [dual.dims.n_text_layer] * len(axes.images)
    assert (len(first.images), len(second.images)) == (4, 2)  # a column for each word
    assert first.images[0].get_array()[:, 0].tolist() == pytest.approx(seen(dual).gate[0].tolist())  # type: ignore[index]
    assert "primary" in scale.get_xticklabels()[-1].get_text()
    with pytest.raises(OptionError, match="one branch"):
        draw_gates([seen(pair()[0])])


def test_mixtures_have_the_snr_asked_for() -> None:
    rng = np.random.default_rng(0)
    speech, other = (0.1 * rng.standard_normal(n).astype(np.float32) for n in (32000, 11000))
    mixed, scaled = mixed_at(speech, other, 6.0)
    assert np.allclose(mixed, speech + scaled, atol=1e-6)
    assert 10 * np.log10((speech**2).mean() / (scaled**2).mean()) == pytest.approx(6.0, abs=0.1)


def test_files_of_a_clean_and_noisy_pair(model: Path, tmp_path: Path) -> None:
    speech = 0.2 * noise(2.0)
    disturbed = speech.copy()
    disturbed[16000:] += 0.5 * np.sin(np.arange(16000) * 0.3).astype(np.float32)
    clean = write_wav(tmp_path / "clean.wav", speech)
    noisy = write_wav(tmp_path / "noisy <b>.wav", 0.5 * disturbed)
    given = ["--clean", clean, "--text", TEXT, "--language", "en", "--model", model, "-o", tmp_path / "out"]
    assert run("visualize", noisy, *given) == 0
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".html", ".json", ".png"]
    data = json.loads((tmp_path / "out" / "noisy <b>.json").read_text())
    first, second = data["views"]
    assert first["noise"] is None
    assert max(second["noise"][:49]) < 0.1
    assert min(second["noise"][51:]) > 0.5
    assert second["attention_on_noise"]["positions"] == pytest.approx(0.5, abs=0.03)
    page = (tmp_path / "out" / "noisy <b>.html").read_text()
    assert not re.search(r"https?:|src=|@import|fetch\(|/\*DATA\*/", page)
    assert "<b>.wav" not in page  # a file's name can't become markup
    inline, sounds = (json.loads(page.split(f"const {name} = ")[1].split(";\n")[0]) for name in ("data", "sounds"))
    assert inline == data
    for sound, path in zip(sounds, (clean, noisy)):  # it can be played
        assert np.abs(load_audio(base64.b64decode(sound.split(",")[1])) - load_audio(path)).max() < 1e-3


def test_noise_of_ones_own(model: Path, tmp_path: Path) -> None:
    speech, hum = (write_wav(tmp_path / f"{name}.wav", 0.3 * noise(s)) for name, s in (("speech", 2), ("hum", 1)))
    given = ["--noise", hum, "--snr", "-30", "--text", TEXT, "--model", model, "-f", "json", "-o", tmp_path]
    assert run("visualize", speech, *given) == 0
    views = json.loads((tmp_path / "speech.json").read_text())["views"]
    assert views[1]["title"] == "speech.wav with hum.wav at -30 dB"
    assert views[1]["attention_on_noise"]["positions"] > 0.95


def test_bad_input_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    speech, other = (write_wav(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(32000)) for i in range(2))
    silent = write_wav(tmp_path / "silent.wav", np.zeros(32000))
    common = ["--model", model, "-o", tmp_path]
    for given, said in [
        ([speech, "--clean", other], "does not hold the speech"),
        ([speech, "--clean", silent], "is silent"),
        ([speech, "--noise", silent], "is silent"),
        ([speech, "--noise", other, "--clean", other], "can't be given together"),
        ([tmp_path / "none.wav"], "none.wav"),
        ([speech, "--start", "-1"], "start is 0 or more"),
        ([speech, "--text", " "], "no word is heard"),
    ]:
        assert run("visualize", *given, *common) == 1
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert said in line


def test_without_matplotlib(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    clip = write_wav(tmp_path / "clip.wav", noise(1))
    given = ["--model", model, "--text", TEXT, "-o", tmp_path / "out"]
    assert run("visualize", clip, *given) == 0
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".html", ".json"]
    for picture in ("png", "gate.png"):
        assert run("visualize", clip, "--model", tmp_path / "none.pt", "-f", picture) == 1  # before any model is loaded
        assert "dawhisper[plot]" in capsys.readouterr().err


def test_real_speech(base_path: Path, assets: Path) -> None:
    model = load_model(base_path, device="cpu", dual=DualOptions())
    audio = load_audio(assets / "speech.opus")
    view = look(model, audio, "speech", VisualizeOptions("speech.opus", language="en"))
    assert [w.word.strip(",.").lower() for w in view.words[:3]] == ["modern", "printers", "understand"]
    assert torch.allclose(view.gate, torch.full_like(view.gate, 0.8), atol=1e-4)  # type: ignore[arg-type]
    # attention is where the words are: its centre lies within or near the word's time
    centres = (view.primary * torch.arange(view.primary.shape[1])).sum(dim=1) / 50
    assert np.corrcoef(centres, [w.start for w in view.words])[0, 1] > 0.9


def test_the_names_of_special_tokens_are_text(dual: Whisper) -> None:
    assert seen(dual, text="One <|endoftext|> two").text == "One <|endoftext|> two"


def test_silence_has_nothing_to_show(dual: Whisper) -> None:
    with pytest.raises(AudioError, match="no word"):
        look(dual, np.zeros(16000, np.float32), "silence", options(text=""))
