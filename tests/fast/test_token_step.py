"""The token step's Triton kernels against the plain step; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.language.extra.cuda.gdc", reason="no Triton from 3.4 on, which torch 2.8 brings")

from dawhisper.fast import cache as graphs
from dawhisper.fast import token_step
from dawhisper.fast.cache import StaticKVCache, fill, room_for
from dawhisper.kv_cache import KVCache
from dawhisper.model import AudioFeatures, DualOptions, ModelDimensions, Whisper

DIMS = ModelDimensions(80, 70, 64, 2, 1, 100, 80, 64, 2, 1)
DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
EXACT = 1e-2 if DEVICE == "cuda" else 1e-5
ROUNDED = 3e-2 if DEVICE == "cuda" else 1e-2
MODELS = {
    "single": None,
    "dual": DualOptions(),
    "without noise embeddings": DualOptions(n_noise_embed=0),
    "another gate": DualOptions(gate_hidden=24),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "wants_kernels", lambda features: True)
    with torch.no_grad():
        yield


def model_of(name: str) -> Whisper:
    """A random model whose branches, gate and noise differ as after training."""
    torch.manual_seed(0)
    model = Whisper(DIMS, MODELS[name]).eval()
    for block in model.decoder.blocks:
        block.cross_attn.query.weight.mul_(3)  # scores that matter
        if block.secondary_attn is not None:
            block.gate[2].weight.normal_(std=0.5)
            block.secondary_attn.query.weight.mul_(5)
            block.secondary_attn.out.weight.normal_(std=0.2)
            if block.noise_scale is not None:
                block.noise_scale.normal_()
    return model.to(DEVICE, DTYPE)


def features_of(model: Whisper, windows: int, seed: int = 1) -> AudioFeatures:
    torch.manual_seed(seed)
    return model.encode(torch.randn(windows, 80, 140).to(DEVICE, DTYPE))


CASES = [(name, 1, False) for name in MODELS] + [
    ("single", 3, True),
    ("dual", 1, True),
    ("dual", 3, False),
    ("dual", 3, True),
]


@pytest.mark.parametrize("name, group, int8", CASES)
def test_a_block_is_the_plain_block(name: str, group: int, int8: bool) -> None:
    model = model_of(name)
    decoder, features = model.decoder, features_of(model, 2)
    cache = KVCache(decoder, features)
    decoder(torch.randint(0, 100, (2, 5), device=DEVICE), cache=cache)
    cache.repeat(group)
    x = torch.randn(2 * group, 1, 64).to(DEVICE, DTYPE)
    block, states = decoder.blocks[0], cache.states[0].clone()
    memory = block.memory(features, decoder.noise_embed)
    room = room_for(memory, int8)
    fill(room, memory)
    position = torch.tensor([5], device=DEVICE)
    got = token_step.block_step(block, token_step.StepWeights(block), room, states, position, 16, x[:, 0])
    expected = block(x, cache.memories[0], cache, 0, False, None)[0][:, 0]
    torch.testing.assert_close(got, expected, atol=ROUNDED if int8 else EXACT, rtol=0)
    torch.testing.assert_close(states[..., :6, :], cache.states[0][..., :6, :], atol=EXACT, rtol=0)


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_steps_of_a_cache_that_is_used_again(int8: bool) -> None:
    model = model_of("dual")
    decoder = model.decoder
    decoder.int8_memory = int8
    static = None
    for seed in (1, 2, 3) if DEVICE == "cuda" else (1, 2):  # a GPU captures at the second use
        features = features_of(model, 2, seed)
        tokens = torch.randint(0, 100, (2, 3), device=DEVICE)
        if static is None:
            static = StaticKVCache(decoder, features, 1)
        else:
            decoder.blocks[0].attn.query.weight.mul_(1.5)  # weights of which there are copies
            static.refill(decoder, features)
        plain = KVCache(decoder, features)
        caches: list[KVCache] = [plain, static]
        expected, got = (cache.first_logits(decoder, tokens[:, :2], [0, 1]) for cache in caches)
        steps = [[cache.next_logits(decoder, token).clone() for token in tokens[:, 2:].split(1, 1)] for cache in caches]
        tolerance = {"atol": 3 * (ROUNDED if int8 else EXACT), "rtol": EXACT / 5}
        torch.testing.assert_close(got.float(), expected.float(), **tolerance)
        torch.testing.assert_close(torch.stack(steps[1]).float(), torch.stack(steps[0]).float(), **tolerance)
        # a long prompt goes another way
        caches[0], _ = KVCache(decoder, features), static.refill(decoder, features)
        long = torch.randint(0, 100, (2, 12), device=DEVICE)
        expected, got = (cache.first_logits(decoder, long, [11]) for cache in caches)
        torch.testing.assert_close(got.float(), expected.float(), **tolerance)


def test_int8_rounds_each_channel_by_its_own_scale() -> None:
    x = torch.randn(2, 3, 150, 32).to(DEVICE, DTYPE) * torch.logspace(-2, 1, 32).to(DEVICE, DTYPE)
    y = torch.empty(2, 3, 150, 32, dtype=torch.int8, device=DEVICE)
    scales = torch.empty(2, 3, 32, device=DEVICE)
    token_step.quantize_memory(x, y, scales)
    error = (y * scales[:, :, None] - x.float()).abs()
    assert (error <= 0.501 * scales[:, :, None] + 1e-3 * x.float().abs()).all()
    assert y.abs().amax(2).min() == 127


@pytest.mark.parametrize("rows, k, n", [(1, 64, 50), (5, 96, 16), (70, 2048, 24), (1, 64, 4200)])
def test_linear_of_odd_sizes(rows: int, k: int, n: int) -> None:
    x, weight, bias = (torch.randn(*shape).to(DEVICE, DTYPE) / 8 for shape in ((rows, k), (n, k), (n,)))
    expected = torch.nn.functional.gelu(x @ weight.T + bias)
    torch.testing.assert_close(token_step.linear(x, weight, bias, gelu=True), expected, atol=EXACT, rtol=EXACT)


def test_most_likely_is_the_first_of_the_best() -> None:
    logits = torch.randn(3, 2, 9000, device=DEVICE)
    logits[..., ::7] = -torch.inf
    logits[1, :, [8000, 4098]] = 9.0
    logits = logits[:, 1]  # the first ones come among those of other positions
    token, logprob = token_step.most_likely(logits)
    expected: Tensor = logits.log_softmax(-1)
    assert token.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprob, expected.amax(-1), atol=1e-5, rtol=0)
