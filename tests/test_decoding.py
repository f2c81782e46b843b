"""Decoding against openai-whisper's own, single windows and batches of them."""

from __future__ import annotations

import math

import pytest
import torch
import whisper
from helpers.models import MULTILINGUAL, VARIANTS, mels, pair, talkative, trained
from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens

from dawhisper import ranking
from dawhisper.decoding import (
    DecodingOptions,
    Rules,
    decode,
    detect_language,
    initial_tokens,
    language_code,
    model_tokenizer,
)
from dawhisper.errors import OptionError
from dawhisper.kv_cache import KVCache
from dawhisper.model import DualOptions, TextDecoder, Whisper

CASES = {
    "greedy": {"language": "en"},
    "detected language": {},
    "translate": {"task": "translate", "language": "az"},
    "no timestamps": {"language": "fr", "without_timestamps": True},
    "beam": {"beam_size": 5},
    "beam, patient": {"beam_size": 3, "patience": 2.0, "length_penalty": 0.6},
    "beam, impatient": {"beam_size": 4, "patience": 0.5, "without_timestamps": True},
    "best of": {"temperature": 0.7, "best_of": 3},
    "sampling": {"temperature": 0.4, "length_penalty": 1.0},
    "prompt and prefix": {"prompt": "Hello there, Bob.", "prefix": " Six spoons", "language": "en"},
    "token prompt": {"prompt": list(range(300, 900)), "prefix": [400, 500], "language": "en"},
    "nothing suppressed": {"suppress_tokens": "", "suppress_blank": False, "language": "en"},
    "some suppressed": {"suppress_tokens": "5,6,7", "language": "en"},
    "late start": {"max_initial_timestamp": None, "language": "en"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_openai_whisper(case: str) -> None:
    ours, theirs = pair()
    options = {"sample_len": 16, **CASES[case]}
    for mel in mels(3):
        torch.manual_seed(5)
        expected = whisper.decode(theirs, mel, whisper.DecodingOptions(fp16=False, **options))
        torch.manual_seed(5)
        got = decode(ours, mel, DecodingOptions(**options))
        assert got.tokens == expected.tokens
        assert (got.text, got.language, got.temperature) == (expected.text, expected.language, expected.temperature)
        assert got.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-4)
        assert got.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-5)
        assert got.compression_ratio == pytest.approx(expected.compression_ratio)


@pytest.mark.parametrize("without_timestamps", [True, False])
@pytest.mark.parametrize("beam_size", [None, 3])
def test_a_model_that_knows_silence_may_end_at_once(without_timestamps: bool, beam_size: int | None) -> None:
    model = talkative(Whisper(MULTILINGUAL).eval(), eot_bias=1e3)  # it would rather say nothing
    options = DecodingOptions(language="en", without_timestamps=without_timestamps, beam_size=beam_size, sample_len=6)
    stock = decode(model, mels(1)[0], options)
    model.knows_silence = True
    silent = decode(model, mels(1)[0], options)
    assert silent.text == "" and silent.compression_ratio == 0
    if without_timestamps:  # Whisper demands a first word; after a first time stamp it may end anyway
        assert stock.text and silent.tokens == []
    else:
        assert stock.tokens == silent.tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    ours, theirs = pair(VARIANTS[variant])
    mel = mels(1, ours.dims.n_mels)[0]
    options = {"language": "en", "sample_len": 12, "beam_size": 2}
    expected = whisper.decode(theirs, mel, whisper.DecodingOptions(fp16=False, **options))
    assert decode(ours, mel, DecodingOptions(**options)).tokens == expected.tokens


@pytest.mark.parametrize("case", [c for c in CASES if "temperature" not in CASES[c]])
def test_a_batch_equals_its_windows(case: str) -> None:
    model = talkative(trained(DualOptions()))
    options = DecodingOptions(**{"sample_len": 16, **CASES[case]})
    batch = mels(8)
    together = decode(model, batch, options)
    for mel, got in zip(batch, together):
        alone = decode(model, mel, options)
        assert got.tokens == alone.tokens
        assert got.language == alone.language
        assert got.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)


def test_windows_end_on_their_own() -> None:
    """Rows that end early wait for the others without changing, with beams as well."""
    ours, theirs = pair(eot_bias=52.0)
    batch = mels(8) * torch.linspace(0.1, 3, 8)[:, None, None]
    lengths = []
    for case in ({}, {"beam_size": 3}, {"beam_size": 3, "patience": 0.7}):
        options = {"language": "en", "without_timestamps": True, "sample_len": 30, **case}
        got = decode(ours, batch, DecodingOptions(**options))
        expected = [whisper.decode(theirs, mel, whisper.DecodingOptions(fp16=False, **options)) for mel in batch]
        assert [r.tokens for r in got] == [r.tokens for r in expected]
        lengths.append([len(r.tokens) for r in got])
    assert len(set(lengths[0])) > 1  # they do end at different times


def test_rows_that_are_done_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and what each window says is what it says alone."""
    ours, _ = pair(eot_bias=52.0)
    batch = mels(8) * torch.linspace(0.1, 3, 8)[:, None, None]
    options = DecodingOptions(language="en", without_timestamps=True, sample_len=30)
    alone = [decode(ours, mel, options) for mel in batch]
    steps, step = [], KVCache.next_logits

    def counted(cache: KVCache, decoder: TextDecoder, tokens: torch.Tensor) -> torch.Tensor:
        steps.append(len(tokens))
        return step(cache, decoder, tokens)

    monkeypatch.setattr(KVCache, "next_logits", counted)
    together = decode(ours, batch, options)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.avg_logprob for r in together] == pytest.approx([r.avg_logprob for r in alone], abs=1e-4)
    ends = [len(r.tokens) for r in alone]
    for n, rows in enumerate(steps, 1):
        going = sum(end >= n for end in ends)
        assert going <= rows and (4 * going > 3 * rows or going == 0), (n, rows, ends)
    assert min(steps) < len(batch)


def test_rules_equal_openai_whispers() -> None:
    ours, _ = pair()
    tokenizer = model_tokenizer(ours, "en", "transcribe")
    rules = Rules(ours, tokenizer, DecodingOptions())
    begin, eot = tokenizer.timestamp_begin, tokenizer.eot
    suppress = SuppressTokens(rules.never.tolist())
    filters = [SuppressBlank(tokenizer, 3), suppress, ApplyTimestampRules(tokenizer, 3, 50)]
    histories = [
        [[]],
        [[begin], [begin + 20]],
        [[begin, 300], [begin, begin + 4], [begin + 7, 400]],
        [[begin, 300, begin + 30], [begin, 300, 301], [begin + 2, 5, eot]],
        [[begin, 300, begin + 30, begin + 30], [begin, 300, begin + 9, eot], [begin, 1, 2, begin + 1500]],
        [[begin, 300, begin + 30, begin + 30, 9], [begin, 300, begin + 9, begin + 11, 4]],
    ]
    generator = torch.Generator().manual_seed(0)
    for sampled in histories:
        for towards_times in (0.0, 3.0):
            logits = 3 * torch.randn(len(sampled), 51865, generator=generator)
            logits[:, begin:] += towards_times
            tokens = torch.tensor([[50258, 50259, 50359, *row] for row in sampled])
            expected, got = logits.clone(), logits.clone()
            for one in filters:
                one.apply(expected, tokens)
            rules.apply(got, tokens[:, 3:])
            assert torch.equal(got, expected), sampled


def test_detects_languages_like_openai_whisper() -> None:
    ours, theirs = pair()
    batch = mels(3)
    expected_tokens, expected = whisper.detect_language(theirs, batch)
    tokens, probs = detect_language(ours, batch)
    assert tokens.tolist() == expected_tokens.tolist()
    for got, want in zip(probs, expected):
        assert got == pytest.approx(want, abs=1e-5)
    one_token, one = detect_language(ours, batch[0])
    assert one_token == tokens[0]
    assert one == pytest.approx(probs[0], abs=1e-6)
    result = decode(ours, batch[1], task="lang_id")
    assert result.language == max(probs[1], key=probs[1].get)
    assert math.isclose(sum(result.language_probs.values()), 1, abs_tol=1e-5)


def test_features_in_place_of_a_mel() -> None:
    model = trained(DualOptions())
    batch, options = mels(2), DecodingOptions(language="en", sample_len=8)
    with torch.no_grad():
        features = model.encode(batch)
    expected = [r.tokens for r in decode(model, batch, options)]
    assert [r.tokens for r in decode(model, features, options)] == expected
    again = decode(model, decode(model, batch[0], options).audio_features, options)
    assert again.tokens == expected[0]
    with pytest.raises(OptionError, match="AudioFeatures"):
        decode(model, features.primary, options)
    single, _ = pair()
    with torch.no_grad():
        features = single.encode(batch)
    assert [r.tokens for r in decode(single, features.primary, options)] == [
        r.tokens for r in decode(single, batch, options)
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beam_size": 5, "best_of": 5, "temperature": 0.5}, "together"),
        ({"best_of": 5}, "temperature above 0"),
        ({"patience": 1.0}, "beam_size"),
        ({"length_penalty": 2.0}, "between 0 and 1"),
        ({"task": "sing"}, "transcribe, translate"),
        ({"language": "azerbajani"}, "azerbaijani"),
        ({"language": "xx"}, "unknown language"),
        ({"temperature": -1.0}, "temperature"),
        ({"beam_size": 0}, "at least 1"),
        ({"beam_size": 2, "patience": 0.1}, "patience"),
        ({"suppress_tokens": "a,b"}, "comma-separated"),
        ({"prefix": list(range(460))}, "text context has 448"),
    ],
)
def test_wrong_options(options: dict, says: str) -> None:
    model, _ = pair()
    with pytest.raises(OptionError, match=says):
        decode(model, mels(1)[0], DecodingOptions(**options))


def test_wrong_shapes() -> None:
    model, _ = pair()
    for mel, says in [
        (torch.zeros(128, 3000), "80 mel"),
        (torch.zeros(160, 3000), "80 mel"),  # for a model whose branches hear apart
        (torch.zeros(80, 100), "3000 frames"),
        (torch.zeros(3), "3 dim"),
    ]:
        with pytest.raises(OptionError, match=says):
            decode(model, mel)
    with pytest.raises(OptionError, match="English only"):
        detect_language(pair(VARIANTS["english"])[0], torch.zeros(80, 3000))


def test_languages_by_code_and_name() -> None:
    assert language_code("az") == language_code("Azerbaijani") == "az"
    with pytest.raises(OptionError, match="newer"):  # Cantonese came with large-v3
        model_tokenizer(pair()[0], "yue")


def test_special_tokens_in_a_prompt_are_text() -> None:
    model, _ = pair()
    tokenizer = model_tokenizer(model, "en")
    tokens = initial_tokens(model, tokenizer, DecodingOptions(language="en", prompt="<|endoftext|> so"))
    assert tokens[0] == tokenizer.sot_prev and tokenizer.eot not in tokens


@pytest.mark.parametrize("case", ["greedy", "beam", "beam, patient", "beam, impatient", "best of"])
def test_log_probabilities_are_those_of_the_tokens(case: str) -> None:
    """Each one is what the model gives its token after those before it, under the rules; their mean is avg_logprob."""
    model = talkative(trained(DualOptions()), eot_bias=30.0)
    options = DecodingOptions(**{"language": "en", "sample_len": 12, **CASES[case]})
    torch.manual_seed(2)
    for mel, got in zip(mels(3), decode(model, mels(3), options)):
        assert len(got.logprobs) == len(got.tokens)
        tokenizer = model_tokenizer(model, "en")
        first = initial_tokens(model, tokenizer, options)
        rules = Rules(model, tokenizer, options)
        tokens = torch.tensor([*first, *got.tokens])
        with torch.no_grad():
            logits = model.logits(tokens[None], model.encode(mel[None]))[0, len(first) - 1 :]
        expected = []
        for i, token in enumerate([*got.tokens, tokenizer.eot]):
            rules.apply(logits[i : i + 1], torch.tensor([got.tokens[:i]], dtype=torch.long))
            expected.append(float(logits[i].log_softmax(-1)[token]))
        assert got.logprobs == pytest.approx(expected[:-1], abs=5e-4)  # the logits are large
        ended = len(got.tokens) < 12  # where there was no room, <|endoftext|> was not reached
        assert got.avg_logprob == pytest.approx(sum(expected[: None if ended else -1]) / len(expected), abs=1e-4)


@pytest.mark.parametrize("case", ["beam", "beam, patient", "best of"])
def test_n_best(case: str) -> None:
    model = talkative(trained(DualOptions()))
    options = DecodingOptions(**{"language": "en", "sample_len": 12, "n_best": 3, **CASES[case]})
    for got in decode(model, mels(2), options):
        texts = [each.text for each in got.alternatives]
        assert texts[0] == got.text and got.alternatives[0].tokens == got.tokens
        assert 1 < len(texts) <= 3 and len(set(texts)) == len(texts)
        scores = [each.score for each in got.alternatives]
        assert scores == sorted(scores, reverse=True)


def test_least_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of beams and samples the text nearest to the samples, and its own log probabilities; beams alone otherwise."""
    model = talkative(trained(DualOptions()))
    options = DecodingOptions(language="en", sample_len=8, beam_size=3, rerank="mbr", n_best=3)
    monkeypatch.setattr(ranking, "SAMPLES", 4)
    torch.manual_seed(0)
    for got in decode(model, mels(2), options):
        assert len(got.tokens) == len(got.logprobs) and got.alternatives[0].text == got.text
    assert ranking.risks(["abc", "abd", "xyz"], ["abd", "abe"]).tolist() == [1.0, 0.5, 3.0]
    ranked = [([500], [-0.1], -0.1), ([600], [-0.2], -0.2)]
    samples = [([600], [-0.2], -0.2), ([700], [-0.3], -0.3), ([600], [-0.2], -0.2)]
    assert ranking.by_risk(ranked, samples, model_tokenizer(model))[0] == ranked[1]
    assert (
        ranking.by_risk(ranked, ranked, model_tokenizer(model))[0] == ranked[0]
    )  # what is equally far stays in its order
    with pytest.raises(OptionError, match="rerank is mbr or None"):
        DecodingOptions(rerank="vote").verify()
