"""The token step on tensors that stay in place: on the CPU without, on a GPU with CUDA graphs."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.models import MULTILINGUAL, mels, talkative, trained

from dawhisper.decoding import DecodingOptions, decode, model_tokenizer
from dawhisper.fast import cache as graphs
from dawhisper.model import DualOptions, Whisper

CASES = {
    "greedy": {"sample_len": 70},  # from one span to the next
    "detected language": {"language": None, "sample_len": 10},
    "beam": {"beam_size": 3, "sample_len": 20},
    "best of": {"temperature": 0.7, "best_of": 3, "sample_len": 12},
    "prompt": {"prompt": list(range(300, 400)), "sample_len": 30},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def model_on(device: str, dual: DualOptions | None = None) -> Whisper:
    torch.manual_seed(0)
    return talkative(trained(dual) if dual else Whisper(MULTILINGUAL).eval()).to(device)


def tokens_of(model: Whisper, mel: torch.Tensor, **options) -> list[list[int]]:
    torch.manual_seed(7)
    results = decode(model, mel, DecodingOptions(**{"language": "en", **options}))
    return [result.tokens for result in results]


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch):
    """Switches between the static step, which is a GPU's, and the step that a CPU takes."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(graphs, "wants_graphs", lambda features: on)

    return switch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dual", [None, DualOptions()], ids=["single", "dual"])
@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_step_by_step(case: str, dual: DualOptions | None, device: str, static) -> None:
    model, first, second = model_on(device, dual), mels(2), 3 * mels(4)[2:]
    static(False)
    expected = [tokens_of(model, mel, **CASES[case]) for mel in (first, second)]
    static(True)
    # the second time in the memory, and with the graphs, of the first
    assert [tokens_of(model, mel, **CASES[case]) for mel in (first, second)] == expected
    assert len(graphs._kept[model.decoder]) == 1
    assert expected[0] != expected[1]


def test_new_weights_and_shapes_get_caches_of_their_own(static) -> None:
    static(True)
    model = model_on("cpu")
    options = {"sample_len": 8}
    before = tokens_of(model, mels(1), **options)
    with torch.no_grad():
        model.decoder.positional_embedding = torch.nn.Parameter(model.decoder.positional_embedding.flip(0))
    after = tokens_of(model, mels(1), **options)
    static(False)
    assert after == tokens_of(model, mels(1), **options) != before


def test_weights_changed_in_place_are_the_next_windows(static) -> None:
    static(True)
    model = model_on("cpu", DualOptions())
    before = tokens_of(model, mels(1), sample_len=8)
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.attn.value.weight.mul_(-5)
            block.secondary_attn.query.weight.mul_(20)
    after = tokens_of(model, mels(1), sample_len=8)
    assert len(graphs._kept[model.decoder]) == 1
    static(False)
    assert after == tokens_of(model, mels(1), sample_len=8) != before


def test_old_caches_make_room(static, monkeypatch: pytest.MonkeyPatch) -> None:
    static(True)
    model = model_on("cpu")

    def windows_kept() -> list[int]:
        return [len(cache.memories[0].key) for cache in graphs._kept[model.decoder].values()]

    for windows in (1, 2, 3, 1):
        tokens_of(model, mels(windows), sample_len=2)
    assert windows_kept() == [2, 3, 1]
    room = sum(cache.nbytes for cache in graphs._kept[model.decoder].values())
    monkeypatch.setattr(graphs, "most_bytes", lambda device: room)
    tokens_of(model, mels(4), sample_len=2)
    assert windows_kept() == [1, 4]
    monkeypatch.setattr(graphs, "most_bytes", lambda device: 0)
    tokens_of(model, mels(1), sample_len=2)
    assert windows_kept() == [1]


def test_a_cache_in_use_is_not_shared(static) -> None:
    static(True)
    model = model_on("cpu")
    with torch.no_grad():
        features = model.encode(mels(1))
        with (
            graphs.open_cache(model.decoder, features, 1, 9) as one,
            graphs.open_cache(model.decoder, features, 1, 9) as other,
        ):
            assert one is not other


def test_models_with_caches_can_be_copied_and_are_freed(static) -> None:
    static(True)
    model = model_on("cpu")
    expected = tokens_of(model, mels(1), sample_len=4)
    again = copy.deepcopy(model)
    assert tokens_of(again, mels(1), sample_len=4) == expected
    held = len(graphs._kept)
    del again
    assert len(graphs._kept) == held - 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; on a CPU compiling takes a minute")
def test_compiled_blocks_give_the_same_tokens(static) -> None:
    model = model_on("cuda", DualOptions())
    static(True)
    expected = tokens_of(model, mels(2), sample_len=70)
    model.compile_blocks()
    assert tokens_of(model, mels(2), sample_len=70) == expected


def test_without_kernels_it_decodes_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "dawhisper.fast.token_step", SimpleNamespace(linear=None))
    monkeypatch.setattr(torch.cuda, "device", lambda device: (_ for _ in ()).throw(RuntimeError("no compiler\nhere")))
    with pytest.warns(UserWarning, match="slower.*no compiler here"):
        assert not graphs.triton_works(gpu, torch.float16)
    assert not graphs.triton_works(gpu, torch.float16)  # told once
    graphs.triton_works.cache_clear()
    monkeypatch.setitem(sys.modules, "dawhisper.fast.token_step", None)
    with pytest.warns(UserWarning, match="torch 2.8 or newer"):
        assert not graphs.triton_works(gpu, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not graphs.triton_works(gpu, torch.bfloat16)
    assert not graphs.triton_works(torch.device("cpu"), torch.float16)
    graphs.triton_works.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graphs_in_half_precision(dtype: torch.dtype, static) -> None:
    model = model_on("cuda", DualOptions()).to(dtype)
    static(False)
    expected = tokens_of(model, mels(2), sample_len=20)
    static(True)
    got = tokens_of(model, mels(2), sample_len=20)
    assert model.decoder in graphs._kept
    for mel, mine, plain in zip(mels(2), got, expected):  # other kernels: near ties, and they alone, may fall otherwise
        n = next((i for i, pair in enumerate(zip(mine, plain)) if len(set(pair)) == 2), None)
        if n is not None:
            tokens = torch.tensor([[*model_tokenizer(model, language="en").sot_sequence, *mine[:n]]], device="cuda")
            logits = model(mel[None].to("cuda", dtype), tokens)[0, -1]
            assert (logits[mine[n]] - logits[plain[n]]).abs() < 4 * torch.finfo(dtype).eps * logits.abs().max()
