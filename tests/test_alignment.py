"""A text's words find their times: the matching, the windows, and clips whose text is known."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dawhisper import Whisper, Word, load_audio, load_model
from dawhisper.alignment import GivenWord, align, at_pauses, check_fit, given_words, into_segments, rough_times, windows
from dawhisper.cli import main
from dawhisper.decoding import model_tokenizer
from dawhisper.errors import OptionError
from dawhisper.writers import WRITERS

TEXT = "so that the waters were made to stand firm as a wall on either side."


def given(text: str) -> list[GivenWord]:
    return [GivenWord(" " + word, [i], 0) for i, word in enumerate(text.split())]


def heard(text: str, start: float = 0.0, pause: float = 0.0) -> list[Word]:
    return [Word(" " + w, start + i, start + i + 1 - pause, 0.9) for i, w in enumerate(text.split())]


def test_words_take_the_times_of_those_that_were_heard() -> None:
    rough = rough_times(given("one two, THREE four five six"), heard("and one two for three fore five", 10.0), 60.0)
    assert rough.certain.tolist() == [True, True, True, False, True, False]
    assert rough.start.tolist() == [11, 12, 14, 15, 16, 16.75]  # "four" between its neighbours, "six" behind the last
    assert rough.end[:5].tolist() == [12, 13, 15, 16, 17]


def test_another_text_is_refused_and_a_missing_passage_told() -> None:
    words = list("abcdefghijklmnopqrst")
    with pytest.raises(OptionError, match="of the text's 20 words 5 were heard"):
        check_fit(given(" ".join(words)), rough_times(given(" ".join(words)), heard("a b c d e"), 60.0), "en")
    left_out = rough_times(given(" ".join(words)), heard(" ".join(words[:5] + words[15:])), 60.0)
    with pytest.warns(UserWarning, match=r"in the text, but not heard, 00:\d\d.* f g h i j k l m n o"):
        check_fit(given(" ".join(words)), left_out, "en")
    more = rough_times(given(" ".join(words[:5] + words[15:])), heard(" ".join(words)), 60.0)
    with pytest.warns(UserWarning, match=r"heard, but not in the text, 00:05.000 to 00:15.000: f g h"):
        check_fit(given(" ".join(words[:5] + words[15:])), more, "en")


def test_windows_end_in_pauses_and_hold_every_word_once() -> None:
    words = heard(" ".join(f"w{i}" for i in range(100)), pause=0.1)
    words[17] = Word(" w17", 17.0, 17.5, 0.9)  # the longest pause of the first 26 s is behind it
    rough = rough_times(given(" ".join(f"w{i}" for i in range(100))), words, 100.0)
    found = list(windows(given(" ".join(f"w{i}" for i in range(100))), rough, 440))
    assert found[0] == (0, 18)
    assert [k for first, end in found for k in range(first, end)] == list(range(100))
    assert all(rough.end[end - 1] - rough.start[first] <= 26 for first, end in found)
    few = list(windows(given(" ".join(f"w{i}" for i in range(100))), rough, 5))
    assert max(end - first for first, end in few) <= 5  # no more tokens than the text context takes


@pytest.fixture(scope="module")
def model() -> Whisper:
    return load_model()


def test_the_words_of_a_clip(model: Whisper, assets: Path) -> None:
    """The given text stands in the result as it is, capitals and all, at the times that a transcription gives."""
    result = align(model, assets / "speech_noisy.opus", TEXT.upper(), "en")
    words = [word for segment in result.segments for word in segment.words or ()]
    assert [word.word.strip() for word in words] == TEXT.upper().split()
    starts = [0.0, 0.38, 0.56, 0.72, 1.06, 1.26, 1.52, 1.72, 2.04, 2.36, 2.64, 2.78, 3.02, 3.24, 3.58]
    assert [word.start for word in words] == pytest.approx(starts, abs=0.25)


def test_a_long_recording_and_sentences_on_lines(model: Whisper, assets: Path) -> None:
    """Longer than a window, with a long pause; each line is a segment at its own time, misheard words included."""
    clips = [load_audio(assets / name) for name in ("speech_quiet.opus", "speech.opus")]
    pause = np.zeros(25 * 16000, np.float32)
    other = "Modern printers understand this, but it is only practised in the very best establishments."
    result = align(model, np.concatenate([clips[0], pause, clips[1]]), f"{TEXT}\n{other}", "en")
    assert [segment.text.strip() for segment in result.segments] == [TEXT, other]
    first, second = result.segments
    assert 0 <= first.start < 1 and 3.5 < first.end < 4.6
    assert 28.7 < second.start < 30.5 and 34.5 < second.end < 35.8
    words = [word for segment in result.segments for word in segment.words or ()]
    assert all(a.start <= a.end <= b.start + 0.01 for a, b in itertools.pairwise(words))


def test_a_text_without_punctuation(model: Whisper, assets: Path) -> None:
    """The word behind a pause doesn't take it, and the text is cut there."""
    clips = [load_audio(assets / name) for name in ("speech_quiet.opus", "speech.opus")]
    other = "modern printers understand this but it is only practised in the very best establishments"
    text = f"{TEXT[:-1]} {other}"
    result = align(model, np.concatenate([clips[0], np.zeros(2 * 16000, np.float32), clips[1]]), text, "en")
    assert [segment.text.strip() for segment in result.segments] == [TEXT[:-1], other]
    assert result.segments[1].start == pytest.approx(len(clips[0]) / 16000 + 2, abs=0.5)


def test_long_text_is_cut_at_its_longest_pauses() -> None:
    words = [Word(f" {i}", float(i), i + 1.0, 0.5) for i in range(60)]
    assert list(at_pauses(words)) == [words]  # nowhere to cut
    for i, pause in ((9, 0.2), (29, 0.3), (34, 0.1)):
        words[i] = Word(f" {i}", float(i), i + 1 - pause, 0.5)
    assert [len(part) for part in at_pauses(words)] == [10, 20, 5, 25]
    assert [len(part) for part in at_pauses(words[:16])] == [16]


def test_the_command(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    clip = str(assets / "speech_quiet.opus")
    assert main(["align", clip, str(tmp_path / "text.txt"), "--language", "en", "-o", str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"speech_quiet.{kind}" for kind in ("txt", "vtt", "srt", "tsv", "json")}
    assert str(tmp_path / "out" / "speech_quiet.json") in capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "speech_quiet.json").read_text("utf-8"))
    assert [w["word"].strip() for w in made["segments"][0]["words"]] == TEXT.split()
    grid = io.StringIO()
    WRITERS["TextGrid"]("").write_result(made, grid)
    assert grid.getvalue().startswith('File type = "ooTextFile"') and 'text = "waters"' in grid.getvalue()

    (tmp_path / "other.txt").write_text("An entirely different sentence about coffee orders and rainbows.", "utf-8")
    assert main(["align", clip, str(tmp_path / "other.txt"), "--language", "en", "-o", str(tmp_path)]) == 1
    assert "this is not what is spoken in the recording" in capsys.readouterr().err
    assert main(["align", clip, str(tmp_path / "none.txt"), "-o", str(tmp_path)]) == 1
    assert "can't read the text" in capsys.readouterr().err


def test_sentences(model: Whisper) -> None:
    tokenizer = model_tokenizer(model, "en")
    made = given_words("He said so. She didn't!\n\n  A new   line", tokenizer)
    assert [w.sentence for w in made if w.word in (" He", " She", " A")] == [0, 1, 2]
    assert "".join(w.word for w in made) == " He said so. She didn't! A new line"
    words = [(0, Word(f" {i}", i, i + (0.3 if i == 19 else 1.0), 0.5)) for i in range(40)]
    assert [len(s.words or ()) for s in into_segments(words, tokenizer)] == [20, 20]  # a long one ends in its pause
