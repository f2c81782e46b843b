"""Hypotheses drawn from the student, and what they cost against one another."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import MULTILINGUAL, talkative
from torch import Tensor

from dawhisper.decoding import DecodingOptions, model_tokenizer, sample_windows
from dawhisper.model import DualOptions, Whisper
from dawhisper.training import losses
from dawhisper.training.inputs import Inputs
from dawhisper.training.objective import ObjectiveOptions, Student, as_drawn
from dawhisper.training.risk import Sampler

OPTIONS = ObjectiveOptions(
    logits=0, encoder=0, attention=0, gate=0, silence=0, risk=1.0, risk_samples=3, risk_timestamps=0
)


def batch(model: Whisper, texts: list[str], snr: list[float]) -> Inputs:
    """Windows of noise with these texts; an empty one has no labels."""
    tokenizer = model_tokenizer(model, "en", "transcribe")
    start = list(tokenizer.sot_sequence_including_notimestamps)
    rows = [start + (tokenizer.encode(" " + text) + [tokenizer.eot] if text else []) for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.eot] * (width - len(row)) for row in rows])
    labels = torch.tensor([row[1:] + [losses.IGNORE] * (width + 1 - len(row)) for row in rows])
    labels[[not text for text in texts]] = losses.IGNORE
    mel = torch.randn(len(texts), model.dims.n_mels, 200)
    return Inputs(mel, tokens, labels, torch.tensor(snr), torch.ones(len(texts), 100, dtype=torch.bool))


@pytest.fixture(scope="module")
def model() -> Whisper:
    torch.manual_seed(0)
    made = talkative(Whisper(MULTILINGUAL, DualOptions(memory_layers=1), variable_audio_ctx=True), eot_bias=2.0)
    return made.eval()


def test_the_gradient_is_that_of_the_expected_errors() -> None:
    torch.manual_seed(0)
    logits, errors, temperature = torch.randn(1, 5, requires_grad=True), torch.tensor([3.0, 0.0, 1.0, 2.0, 5.0]), 0.7
    p = (logits[0] / temperature).softmax(0)
    (expected,) = torch.autograd.grad((p * errors).sum(), logits)
    # every outcome is drawn as often as its probability says
    each = logits.expand(5, 5)[:, None]
    value = losses.risk(each, torch.arange(5)[:, None], errors * p.detach(), temperature, count=torch.tensor(1.0))
    (estimated,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(estimated, expected)
    nothing = losses.risk(each, torch.full((5, 1), losses.IGNORE), errors)
    assert nothing.item() == 0


def test_samples_begin_as_they_are_told_and_differ(model: Whisper) -> None:
    torch.manual_seed(1)
    tokenizer = model_tokenizer(model)
    first = torch.tensor([tokenizer.sot_sequence_including_notimestamps] * 2)
    first[1, 1] += 3  # another language
    options = DecodingOptions(temperature=1.0, best_of=3, sample_len=12, without_timestamps=True)
    rows = sample_windows(model, model.encode(torch.randn(2, 80, 200)), first, options)
    assert rows.shape == (2, 3, first.shape[1] + 12)
    assert (rows[:, :, : first.shape[1]] == first[:, None]).all()
    assert len({tuple(row) for row in rows.flatten(0, 1).tolist()}) > 1


@pytest.mark.parametrize("stamped", [False, True])
def test_hypotheses_are_what_was_said_and_weighed_against_each_other(model: Whisper, stamped: bool) -> None:
    torch.manual_seed(2)
    inputs = batch(model, ["one two three", "", "four"], [math.inf, 5.0, -math.inf])
    sampler = Sampler(model, dataclasses.replace(OPTIONS, risk_timestamps=float(stamped)), torch.float32)
    said = sampler(model, inputs)
    assert len(said.tokens) == len(said.labels) == len(said.advantage) == 9
    advantage = said.advantage.view(3, 3)
    torch.testing.assert_close(advantage.sum(1), torch.zeros(3))
    if not stamped:  # words were asked for, and the samples differ; a random model says stamps alone where it may
        assert advantage[0].abs().max() > 0
    assert (advantage[1:] == 0).all()  # no text to compare with; no speech
    assert said.errors.item() > 0
    tokenizer = sampler.tokenizer
    eot, begin = tokenizer.eot, len(tokenizer.sot_sequence) + (not stamped)
    assert not stamped or (said.tokens[:, begin] >= tokenizer.timestamp_begin).all()
    assert (said.tokens[:, begin - 1] == tokenizer.no_timestamps).all().item() != stamped
    for tokens, labels in zip(said.tokens.tolist(), said.labels.tolist()):
        heard = [label for label in labels if label != losses.IGNORE]
        assert labels[: begin - 1] == [losses.IGNORE] * (begin - 1)
        assert heard == (tokens[1:] + labels[-1:])[begin - 1 : begin - 1 + len(heard)]
        assert eot not in heard[:-1]  # the end is said once


def test_what_the_rules_force_is_not_learned_as_a_choice(model: Whisper) -> None:
    torch.manual_seed(5)
    inputs = batch(model, ["one two three", "four"], [math.inf, 5.0])
    sampler = Sampler(model, dataclasses.replace(OPTIONS, risk_timestamps=1.0), torch.float32)
    said = sampler(model, inputs)._replace(advantage=torch.ones(6))  # blamed, whatever was said
    tokenizer, begin = sampler.tokenizer, said.begin
    features = model.encode(inputs.mel)
    logits = model.decoder(said.tokens, features, dtype=None).detach().requires_grad_()
    losses.risk(as_drawn(logits * 1, said), said.labels, said.advantage, 0.7).backward()
    assert logits.grad is not None
    text, times = logits.grad[..., : tokenizer.timestamp_begin], logits.grad[..., tokenizer.timestamp_begin :]
    assert not text[:, begin - 1].any() and times[:, begin - 1].any()  # it starts with a time stamp, but which?
    assert not times[:, begin - 1, 51:].any()  # not one after the first second
    # a second stamp or the end must follow a lone one, and text a pair: the other kind is never blamed or praised
    stamps = said.tokens[:, begin:] >= tokenizer.timestamp_begin
    lone = stamps & ~F.pad(stamps, (1, 0), value=True)[:, :-1]
    assert lone.any() and not text[:, begin:, : tokenizer.eot][lone].any()
    pairs = stamps & F.pad(stamps, (1, 0), value=True)[:, :-1]
    assert not times[:, begin:][pairs].any()
    probability = as_drawn(logits.detach().clone(), said).softmax(-1).gather(-1, said.labels.clamp(min=0)[..., None])
    assert (probability[said.labels != losses.IGNORE] > 0).all()


def test_punctuation_and_case_cost_nothing(model: Whisper) -> None:
    sampler = Sampler(model, OPTIONS, torch.float32)
    encode = sampler.tokenizer.encode
    assert sampler.words(encode(" It's, well: A test!")) == sampler.words(encode(" it's well a test"))


def test_learning_lowers_the_errors_of_samples(model: Whisper) -> None:
    torch.manual_seed(3)
    learner = Whisper(MULTILINGUAL, DualOptions(memory_layers=1), variable_audio_ctx=True)
    learner.load_state_dict(model.state_dict())
    inputs, sampler = batch(learner, ["one", "two"], [5.0] * 2), Sampler(learner, OPTIONS, torch.float32)
    student, optimizer = Student(learner, OPTIONS), torch.optim.Adam(learner.parameters(), lr=2e-2)
    counts = torch.tensor([4.0, 0, 4, 1, 1])
    errors = []
    for _ in range(8):
        said = sampler(learner, inputs)
        errors.append(said.errors.item())
        loss, parts = student(inputs, None, counts, said)
        assert "risk" in parts and "sampled_errors" in parts
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(errors[-3:]) < 0.7 * sum(errors[:3])


@pytest.mark.parametrize("held", [0.0, 1.0, math.nan])
def test_a_window_is_heard_through_the_branch_it_is_held_to(model: Whisper, held: float) -> None:
    torch.manual_seed(4)
    decoder, features = model.decoder, model.encode(torch.randn(2, 80, 200))
    tokens = torch.randint(0, 50000, (2, 6))
    with torch.no_grad():
        out = decoder(tokens, features, held=torch.tensor([held, math.nan])[:, None, None])
        free = decoder(tokens, features)
        gates = [block.gate for block in decoder.blocks]
        if not math.isnan(held):
            for block in decoder.blocks:
                block.gate = Constant(held)
        wanted = decoder(tokens, features)
        for block, gate in zip(decoder.blocks, gates):
            block.gate = gate
    torch.testing.assert_close(out[0], wanted[0])
    torch.testing.assert_close(out[1], free[1])
    assert math.isnan(held) or not torch.allclose(out[0], free[0])


class Constant(torch.nn.Module):
    """A gate's logits that always say the same."""

    def __init__(self, share: float):
        super().__init__()
        self.logit = 40.0 if share else -40.0

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :0], (0, 1), value=self.logit)
