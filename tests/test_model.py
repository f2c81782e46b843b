"""The model against openai-whisper's, the second branch, the caches, traces and freezing."""

from __future__ import annotations

import pytest
import torch
import whisper
from helpers.models import DUALS, MULTILINGUAL, VARIANTS, inputs, pair, trained
from torch import nn

from dawhisper.kv_cache import KVCache
from dawhisper.model import DualOptions, LayerNorm, Whisper, is_second_branch
from dawhisper.trace import Trace


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_openai_whisper(variant: str) -> None:
    ours, theirs = pair(VARIANTS[variant])
    mel, tokens = inputs(VARIANTS[variant])
    torch.testing.assert_close(ours(mel, tokens), theirs(mel, tokens), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.embed_audio(mel), theirs.embed_audio(mel), atol=1e-4, rtol=0)
    assert (ours.is_multilingual, ours.num_languages) == (theirs.is_multilingual, theirs.num_languages)


@pytest.mark.parametrize("name", ["base.pt", "tiny.en.pt"])
@torch.no_grad()
def test_real_weights_give_openai_whispers_logits(name: str, weights) -> None:
    from dawhisper import load_model

    ours, theirs = (
        load_model(weights / name, device="cpu", dtype="fp32"),
        whisper.load_model(str(weights / name), device="cpu"),
    )
    mel, tokens = inputs(ours.dims, batch=1)
    torch.testing.assert_close(ours(mel, tokens), theirs(mel, tokens), atol=1e-4, rtol=0)
    ours.add_second_branch(DualOptions())
    torch.testing.assert_close(ours(mel, tokens), theirs(mel, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dual", DUALS.values(), ids=DUALS)
@torch.no_grad()
def test_warm_start_changes_nothing(dual: DualOptions) -> None:
    model, _ = pair()
    mel, tokens = inputs()
    before = model(mel, tokens)
    model.add_second_branch(dual)
    assert torch.equal(model(mel, tokens), before)
    trace = Trace()
    model(mel, tokens, trace)
    torch.testing.assert_close(trace.gate[0], torch.full_like(trace.gate[0], dual.gate_init))


@torch.no_grad()
def test_random_start_changes_the_output() -> None:
    model, _ = pair()
    mel, tokens = inputs()
    before = model(mel, tokens)
    model.add_second_branch(DualOptions(init="random"))
    assert (model(mel, tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("dual", DUALS.values(), ids=DUALS)
@torch.no_grad()
def test_every_part_of_the_second_branch_counts(dual: DualOptions) -> None:
    model = trained(dual)
    mel, tokens = inputs(batch=1)
    before = model(mel, tokens)
    for name, parameter in model.named_parameters():
        # a shift of all keys of a head leaves a softmax as it is: the key has no bias, but change it by rows
        if is_second_branch(name):
            kept = parameter.clone()
            parameter += torch.randn_like(parameter)
            assert not torch.equal(model(mel, tokens), before), name
            parameter.copy_(kept)


@pytest.mark.parametrize("dual", [None, *DUALS.values()], ids=["single", *DUALS])
@torch.no_grad()
def test_cached_equals_uncached(dual: DualOptions | None) -> None:
    model = trained(dual) if dual else pair()[0]
    mel, tokens = inputs(n=9)
    features = model.encode(mel)
    expected = model(mel, tokens)
    cache = KVCache(model.decoder, features, max_length=9)
    steps = [model.decoder(tokens[:, :3], cache=cache), model.decoder(tokens[:, 3:5], cache=cache)]
    steps += [model.decoder(tokens[:, i : i + 1], cache=cache) for i in range(5, 9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dual", [None, DualOptions()], ids=["single", "dual"])
@torch.no_grad()
def test_rows_of_a_window_share_its_audio_and_can_be_reordered(dual: DualOptions | None) -> None:
    model = trained(dual) if dual else pair()[0]
    mel, tokens = inputs(n=4)
    features = model.encode(mel)
    beams = torch.randint(0, 50000, (6, 2), generator=torch.Generator().manual_seed(2))  # three a window
    cache = KVCache(model.decoder, features)
    model.decoder(tokens, cache=cache)
    audio = cache.memories[0].key.data_ptr()
    cache.repeat(3)
    model.decoder(beams[:, :1], cache=cache)
    order = torch.tensor([2, 0, 0, 5, 4, 3])
    cache.select(order)
    got = model.decoder(beams[:, 1:], cache=cache)[:, 0]
    assert cache.memories[0].key.data_ptr() == audio
    assert len(cache.memories[0].key) == 2
    rows = torch.cat([tokens.repeat_interleave(3, 0)[order], beams[order][:, :1], beams[:, 1:]], dim=1)
    expected = model(mel.repeat_interleave(3, 0), rows)[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_its_items() -> None:
    model = trained(DualOptions())
    mel, tokens = inputs(batch=8)
    together = model(mel, tokens)
    for i in range(8):
        torch.testing.assert_close(model(mel[i : i + 1], tokens[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dual", [None, DualOptions(layer_mixture=False), DualOptions()], ids=["no", "one", "own"])
@torch.no_grad()
def test_windows_are_encoded_alike_alone_and_in_a_batch(dual: DualOptions | None) -> None:
    model = trained(dual) if dual else pair()[0]
    got, expected = model.encode(inputs()[0]), model.encoder(inputs()[0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # what is one tensor stays one: its windows are picked and kept once
    assert (got.secondary is got.primary) == (expected.secondary is expected.primary)


@torch.no_grad()
def test_positions_limit_the_logits() -> None:
    model, _ = pair()
    mel, tokens = inputs()
    features = model.encode(mel)
    everything = model.decoder(tokens, features)
    torch.testing.assert_close(model.decoder(tokens, features, positions=[2, 6]), everything[:, [2, 6]])


@torch.no_grad()
def test_trace_records_what_was_attended_to() -> None:
    model = trained(DualOptions(n_noise_embed=0))
    mel, tokens = inputs()
    trace = Trace(layers={1}, attention=True)
    logits = model(mel, tokens, trace)
    assert torch.equal(logits, model(mel, tokens))
    assert set(trace.primary) == set(trace.secondary) == set(trace.gate) == set(trace.output) == {1}
    assert trace.primary[1].shape == trace.secondary[1].shape == (2, 2, 7, 1500)
    # the output can be made again from the scores and the gate
    block, features = model.decoder.blocks[1], model.encoder(mel)
    read = []
    for attention, scores, audio in (
        (block.cross_attn, trace.primary[1], features.primary),
        (block.secondary_attn, trace.secondary[1], features.secondary),
    ):
        value = attention.split(attention.value(audio))
        read.append(attention.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))
    gate = trace.gate[1][..., None]
    torch.testing.assert_close(gate * read[0] + (1 - gate) * read[1], trace.output[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_trace_of_beams_has_a_row_for_each() -> None:
    model = trained(DualOptions())
    mel, tokens = inputs()
    cache = KVCache(model.decoder, model.encode(mel))
    model.decoder(tokens, cache=cache)
    cache.repeat(3)
    trace = Trace(attention=True)
    model.decoder(tokens[:, :2].repeat_interleave(3, 0), cache=cache, trace=trace)
    whole = Trace(attention=True)
    model(mel, torch.cat([tokens, tokens[:, :2]], dim=1), whole)
    assert trace.gate[1].shape == (6, 2)
    torch.testing.assert_close(trace.gate[1], whole.gate[1][:, -2:].repeat_interleave(3, 0), atol=1e-5, rtol=1e-4)
    expected = whole.secondary[1][:, :, -2:].repeat_interleave(3, 0)
    torch.testing.assert_close(trace.secondary[1], expected, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = trained(DualOptions())
    mel, tokens = inputs(batch=1)
    grads = []
    for on in (False, True):
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = on
        model.zero_grad()
        model(mel, tokens).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("mixture", [False, True])
@torch.no_grad()
def test_the_branches_hear_apart(mixture: bool) -> None:
    """Of a mel with twice the bands the secondary's own layers hear the second half, of one with once them the same."""
    model = trained(DualOptions(memory_layers=-1, layer_mixture=mixture))
    first, second = torch.randn(2, 2, 80, 200)
    apart, same = model.encoder(torch.cat([first, second], dim=1)), model.encoder(first)
    assert torch.equal(apart.primary, same.primary) and not torch.equal(apart.secondary, same.secondary)
    torch.testing.assert_close(model.encoder(torch.cat([first, first], dim=1)), same)
    if not mixture:
        torch.testing.assert_close(apart.secondary, model.encoder(second).secondary)
    for dual in (None, DualOptions(memory_layers=1)):
        with pytest.raises(ValueError, match="own copies of all encoder layers"):
            Whisper(MULTILINGUAL, dual).encoder(torch.cat([first, second], dim=1))


@torch.no_grad()
def test_audio_of_any_length_up_to_30_seconds() -> None:
    model, _ = pair()
    mel, _ = inputs()
    assert model.encode(mel[:, :, :400]).primary.shape == (2, 200, 64)
    with pytest.raises(ValueError, match="3002 frames"):
        model.encode(torch.zeros(1, 80, 3002))
    with pytest.raises(ValueError, match="449 tokens"):
        model(mel, torch.zeros(2, 449, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_and_stays_near(dtype: torch.dtype) -> None:
    model = trained(DualOptions())
    mel, tokens = inputs(batch=1)
    expected = model(mel, tokens)
    got = model.to(dtype)(mel.to(dtype), tokens)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_alignment_heads_are_openai_whispers() -> None:
    import dataclasses

    dims = dataclasses.replace(MULTILINGUAL, n_text_layer=6, n_text_head=8, n_audio_head=8)
    ours, theirs = Whisper(dims), whisper.Whisper(whisper.ModelDimensions(**dataclasses.asdict(dims)))
    assert torch.equal(ours.alignment_heads, theirs.alignment_heads.to_dense())
    ours.set_alignment_heads(whisper._ALIGNMENT_HEADS["base"])
    theirs.set_alignment_heads(whisper._ALIGNMENT_HEADS["base"])
    assert torch.equal(ours.alignment_heads, theirs.alignment_heads.to_dense())


@pytest.mark.parametrize(("field", "value"), [("init", "zeros"), ("gate_init", 1.0), ("gate_init", 0.0)])
def test_wrong_dual_options(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DualOptions(**{field: value})


def test_layer_norm_keeps_half_precision_under_autocast() -> None:
    torch.manual_seed(0)
    norm, x = LayerNorm(64), torch.randn(2, 5, 64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    plain = nn.functional.layer_norm(x, (64,), norm.weight, norm.bias)
    assert torch.equal(norm(x), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), plain)
        half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - plain).abs().max() < 0.06  # roundings of 8 bits in numbers up to 5
