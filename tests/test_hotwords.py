"""Hotwords: the tree's gains, step by step and in a batch, and what decoding makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import mels, talkative, trained

from dawhisper import load_model
from dawhisper.audio import load_audio
from dawhisper.decoding import DecodingOptions, decode, model_tokenizer
from dawhisper.errors import OptionError
from dawhisper.hotwords import Hotwords, PrefixTree, read_terms, terms_of
from dawhisper.model import DualOptions
from dawhisper.window import mel_batch


def gains(tree: PrefixTree, tokens: list[int], n_vocab: int = 10) -> list[float]:
    """What each of the tokens gained in turn."""
    hotwords, made = Hotwords(tree, 1.0, 1), []
    for token in tokens:
        made.append(float(hotwords.raised(torch.zeros(1, n_vocab))[0, token]))
        hotwords.follow(torch.tensor([token]))
    return made


TREE = PrefixTree.of([[1, 2, 3], [1, 2], [4, 5, 6], [5, 1]], 10, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7, 8], [0, 0]),
        ([1, 2, 3], [1, 1, 1]),
        ([1, 2, 7], [1, 1, 0]),  # a whole term keeps its gain
        ([1, 7], [1, -1]),  # a part of one does not
        ([4, 5, 7], [1, 1, -2]),
        ([4, 5, 6, 7], [1, 1, 1, 0]),
        ([4, 1, 2], [1, 0, 1]),  # what the first one gained is taken back, and the next term begins
        ([1, 2, 1, 2], [1, 1, 1, 1]),
    ],
)
def test_gains(tokens: list[int], expected: list[float]) -> None:
    assert gains(TREE, tokens) == expected


def test_rows_move_apart_and_along_with_their_beams() -> None:
    hotwords = Hotwords(TREE, 2.0, 3)
    hotwords.follow(torch.tensor([1, 4, 7]))
    hotwords.follow(torch.tensor([5, 2, 9]), rows=torch.tensor([1, 0, 0]))
    raised = hotwords.raised(torch.full((3, 10), -1.0).index_fill(1, torch.tensor([0]), float("-inf")))
    assert raised[0, 6] == -1 + 2 and raised[0, 7] == -1 - 4  # 4 5 ..
    assert raised[1, 3] == -1 + 2 and raised[1, 7] == -1  # 1 2 ..
    assert raised[2, 7] == -1 and raised[2, 4] == -1 + 2  # 1 9
    assert torch.isinf(raised[:, 0]).all()  # what is forbidden stays so


def test_terms() -> None:
    assert terms_of("Szeged, Nagy\nPest,, Nagy ") == ("Szeged", "Nagy", "Pest")
    assert terms_of(["one, two", " "]) == ("one, two",)
    assert terms_of(None) == () and terms_of(" , ") == ()


def test_terms_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\ufeffSzeged\nÁrpád, Nagy\n", "utf-8")
    assert read_terms(str(file)) == ("Szeged", "Árpád", "Nagy")
    assert read_terms("Szeged, Nagy") == ("Szeged", "Nagy") and read_terms(None) == ()
    file.write_bytes(b"\xff\xfeS\x00")
    with pytest.raises(OptionError, match=r"can't read the hotwords in .*names\.txt"):
        read_terms(str(file))


@pytest.mark.parametrize("case", [{}, {"beam_size": 3}, {"temperature": 0.3, "best_of": 2}])
def test_what_is_favoured_is_said_and_its_log_probabilities_are_the_models(case: dict[str, float]) -> None:
    """With a strength beyond all reason everything is hotwords; what the model thinks of that is told as it is."""
    model = talkative(trained(DualOptions()))
    options = {"language": "en", "sample_len": 8, "without_timestamps": True, **case}
    terms = ["Szeged", "Nagy"]
    got = decode(model, mels(3), DecodingOptions(hotwords=terms, hotword_strength=200.0, **options))  # type: ignore
    encode = model_tokenizer(model).encode
    begin = {tuple(encode(space + term))[:1] for term in terms for space in ("", " ")}
    plain = decode(model, mels(3), DecodingOptions(hotwords="", **options))  # type: ignore
    for one, other in zip(got, plain):
        assert tuple(one.tokens[:1]) in begin and ("Szeged" in one.text or "Nagy" in one.text)
        assert one.avg_logprob < other.avg_logprob < 0


def test_a_batch_equals_its_windows() -> None:
    model = talkative(trained(DualOptions()))
    for beams in (None, 3):
        options = DecodingOptions(
            language="en", sample_len=10, beam_size=beams, hotwords="a, the, Nagy", hotword_strength=9.0
        )
        together = decode(model, mels(4), options)
        assert [r.tokens for r in together] == [decode(model, mel, options).tokens for mel in mels(4)]


def test_strength_is_no_negative_number() -> None:
    with pytest.raises(OptionError, match="hotword_strength is 0 or more"):
        DecodingOptions(hotwords="a", hotword_strength=-1.0).verify()


def test_a_term_that_was_missed_is_heard(base_path: Path, assets: Path) -> None:
    """Stock `base` hears "are made" in the noise; "were made", which was read, is its second thought."""
    model = load_model(str(base_path))
    features = model.encode(mel_batch(model, [load_audio(assets / "speech_noisy.opus")]))
    options = DecodingOptions(language="en", without_timestamps=True, beam_size=5)
    (plain,) = decode(model, features, options)
    (got,) = decode(model, features, replace(options, hotwords="Moses, were made, Egypt"))
    assert "the waters are made to stand" in plain.text
    assert got.text.rstrip(".") == plain.text.rstrip(".").replace("are made", "were made")
