"""The types that a CPU computes fastest in, and its layers in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import MULTILINGUAL, inputs, mels, pair, talkative, trained
from whisper.normalizers import EnglishTextNormalizer

from dawhisper import DualOptions, load_model, save_model
from dawhisper.audio import SAMPLE_RATE, load_audio, log_mel_spectrogram, pad_or_trim
from dawhisper.device import PROCESSOR, Processor, choose_dtype
from dawhisper.errors import OptionError
from dawhisper.fast.int8 import (
    Bf16Convolution,
    Bf16Linear,
    Int8Linear,
    Int8RowsLinear,
    Packed,
    ProductMemory,
    quantize_linears,
)
from dawhisper.kv_cache import KVCache
from dawhisper.model import AudioFeatures, CrossMemory, Whisper

needs_int8 = pytest.mark.skipif(not PROCESSOR.int8, reason="no int8 kernels for this processor")
needs_vnni = pytest.mark.skipif(not PROCESSOR.vnni, reason="no 8-bit dot products")
PROCESSORS = {
    "old": pytest.param(Processor(int8=True), marks=needs_int8),
    "vnni": pytest.param(Processor(int8=True, vnni=True), marks=needs_vnni),
    "bf16": pytest.param(Processor(int8=True, vnni=True, bf16=True), marks=needs_vnni),
    "amx": pytest.param(Processor(int8=True, vnni=True, bf16=True, tiles=True), marks=needs_int8),  # slow without
}


def test_the_type_is_chosen_by_what_the_processor_multiplies_fast() -> None:
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    arm, old, vnni = Processor(int8=False), Processor(int8=True), Processor(int8=True, vnni=True)
    assert [choose_dtype("auto", cpu, p) for p in (arm, old, vnni)] == [torch.float32, torch.float32, torch.int8]
    assert choose_dtype(None, cpu, vnni) == torch.float32  # what load_model gives can be trained and saved
    for given in (None, "auto"):
        assert [choose_dtype(given, other, vnni) for other in (cuda, mps)] == [torch.float16, torch.float32]
    assert choose_dtype("fp32", cpu, vnni) == choose_dtype(torch.float32, cpu, vnni) == torch.float32
    assert choose_dtype("int8", cpu, old) == torch.int8


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@torch.no_grad()
def test_each_stage_has_the_fastest_type(processor: Processor) -> None:
    model = quantize_linears(trained(DualOptions(memory_layers=1)), processor)
    encoder, decoder = model.encoder, model.decoder
    many = Bf16Linear if processor.tiles else Int8RowsLinear if processor.vnni else Int8Linear
    blocks = [*encoder.blocks, *encoder.secondary_blocks]
    assert {type(m) for b in blocks for m in b.modules() if isinstance(m, Packed)} == {many}
    assert isinstance(encoder.conv1, Bf16Convolution) == isinstance(encoder.conv2, Bf16Convolution) == processor.tiles
    assert {type(b.cross_attn.joint) for b in decoder.blocks} == {many}
    assert {type(b.mlp[0]) for b in decoder.blocks} == {type(decoder.token_embedding.output)} == {Int8Linear}
    features = model.encode(inputs()[0])
    assert features.primary.dtype == features.secondary.dtype == model.dtype
    kept = decoder.remember(features)[0]
    assert kept.key.dtype == (torch.bfloat16 if processor.bf16 else torch.float32)
    assert isinstance(kept, ProductMemory) == (processor.bf16 and not processor.tiles)


@pytest.mark.parametrize("length, stride", [(20, 1), (20, 2), (7, 2)])
def test_a_convolution_is_one_product(length: int, stride: int) -> None:
    torch.manual_seed(0)
    conv, x = torch.nn.Conv1d(6, 8, kernel_size=3, stride=stride, padding=1), torch.randn(2, 6, length)
    expected = conv(x)
    got = Bf16Convolution(conv)(x)
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0)
    assert got.transpose(1, 2).is_contiguous()  # what follows reads position by position


@needs_int8
@pytest.mark.parametrize("kind", [Int8Linear, pytest.param(Int8RowsLinear, marks=needs_vnni), Bf16Linear])
@torch.no_grad()
def test_each_row_keeps_its_precision(kind: type[Packed]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(3, 7, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    got = kind(linear.weight, None)(x).float()
    expected = torch.nn.functional.linear(x, linear.weight)
    error = (got - expected).abs().amax(dim=(1, 2)) / expected.abs().amax(dim=(1, 2))
    assert (error < 0.02).all(), error
    one = kind(linear.weight, linear.bias)(x[1, :1]).float()
    torch.testing.assert_close(one, linear(x[1, :1]), atol=0.03, rtol=0)
    assert kind(linear.weight, None)(torch.zeros(2, 64)).eq(0).all()


@needs_int8
@pytest.mark.parametrize("kind", [Int8Linear, pytest.param(Int8RowsLinear, marks=needs_vnni), Bf16Linear])
@torch.no_grad()
def test_a_row_gives_the_same_bits_whatever_lies_beside_it(kind: type[Packed]) -> None:
    torch.manual_seed(0)
    layer = kind(torch.randn(96, 128), torch.randn(96))
    x = torch.randn(21, 128) * torch.logspace(-2, 2, 21)[:, None] + torch.randn(21, 1)  # one-sided ones too
    whole = layer(x)
    for rows in (slice(4, 5), slice(0, 2), slice(3, 20)):
        assert torch.equal(layer(x[rows]), whole[rows])
    assert torch.equal(layer(x.view(3, 7, 128)), whole.view(3, 7, 96))


@needs_vnni
@torch.no_grad()
def test_one_sided_rows_use_all_codes() -> None:
    """What follows a GELU lies above -0.17: 8 bits for both signs alike would lose one of them."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 32, bias=False), torch.nn.functional.gelu(2 * torch.randn(40, 256))
    layers = [Int8RowsLinear(linear.weight, None), Int8RowsLinear(linear.weight, None, below=0.25)]
    both_signs, above, each = ((layer(x) - linear(x)).norm() for layer in (*layers, Int8Linear(linear.weight, None)))
    assert above < 0.8 * both_signs
    assert each < 0.8 * both_signs


@pytest.mark.parametrize("n", [1, 3, 20])
@torch.no_grad()
def test_a_memory_read_as_two_products_is_attention(n: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, n, 64), torch.randn(2, 4, 50, 64), torch.randn(2, 4, 50, 64)
    expected = CrossMemory(key, value, None, None).read(query)
    memory = ProductMemory(key.bfloat16(), value.bfloat16(), None, None)
    got = memory.read(query)
    assert got.dtype == query.dtype
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
    rows = torch.tensor([1])  # as a cache keeps some of its windows
    kept = memory._replace(key=memory.key[rows], value=memory.value[rows])
    assert isinstance(kept, ProductMemory)
    assert torch.equal(kept.read(query[rows]), got[rows])


def steps(model: Whisper, features: AudioFeatures, tokens: torch.Tensor) -> torch.Tensor:
    """The logits after a prompt of two tokens and after each step, [B, n - 1, V]."""
    cache = KVCache(model.decoder, features)
    first = cache.first_logits(model.decoder, tokens[:, :2], [1])
    return torch.cat([first, *(cache.next_logits(model.decoder, t)[:, None] for t in tokens[:, 2:].split(1, 1))], 1)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("dual", [None, DualOptions(memory_layers=1)], ids=["single", "dual"])
@torch.no_grad()
def test_a_window_gives_the_same_bits_alone_and_in_a_batch(processor: Processor, dual: DualOptions | None) -> None:
    model = quantize_linears(talkative(trained(dual)) if dual else pair()[0], processor)
    mel, tokens = mels(5)[..., :1300] * torch.logspace(-1, 1, 5)[:, None, None], inputs(batch=5)[1]
    together = model.encode(mel)
    logits = steps(model, together, tokens)
    for i in range(5):
        alone = model.encode(mel[i : i + 1])
        assert torch.equal(alone.secondary, together.secondary[i : i + 1])
        assert torch.equal(steps(model, alone, tokens[i : i + 1])[0], logits[i])


@needs_int8
@torch.no_grad()
def test_real_weights_give_the_same_bits_alone_and_in_a_batch(base_path: Path, assets: Path) -> None:
    for path in (base_path, assets / "dawhisper-base.int8.safetensors"):
        model = load_model(path, device="cpu", dtype="int8")
        names = ("speech.opus", "speech_noisy.opus", "speech_quiet.opus")
        clips = [pad_or_trim(load_audio(str(assets / name)), 5 * SAMPLE_RATE) for name in names]
        mel = torch.stack([log_mel_spectrogram(clip, model.dims.n_mels) for clip in clips])
        tokens = torch.tensor([[50258, 50259, 50359, 50363, 370, 300, 264, 12975]]).expand(3, -1)
        together, features = steps(model, model.encode(mel), tokens), model.encode(mel[1:2])
        assert torch.equal(steps(model, features, tokens[:1])[0], together[1])


@needs_int8
@pytest.mark.parametrize("dual", [None, DualOptions()], ids=["single", "dual"])
@pytest.mark.parametrize("storage", ["fp32", "int8"])
@torch.no_grad()
def test_loaded_in_int8(storage: str, dual: DualOptions | None, tmp_path: Path) -> None:
    model = trained(dual) if dual else pair()[0]
    save_model(model, tmp_path / "model.safetensors", storage)
    exact = load_model(tmp_path / "model.safetensors", device="cpu", dtype="fp32")
    got = load_model(tmp_path / "model.safetensors", device="cpu", dtype="int8")
    left = {name.rpartition(".")[0] for name, module in got.named_modules() if isinstance(module, torch.nn.Linear)}
    assert left == ({f"decoder.blocks.{i}" for i in range(MULTILINGUAL.n_text_layer)} if dual else set())
    packed = [module for module in got.modules() if isinstance(module, Packed) and hasattr(module, "bias")]
    blocks = MULTILINGUAL.n_audio_layer + MULTILINGUAL.n_text_layer
    cross = MULTILINGUAL.n_text_layer * (5 if dual else 3)  # a query for both; of each, memory and out
    convolutions = 2 if PROCESSOR.tiles else 0
    assert len(packed) == (2 + 2) * blocks + cross + 1 + convolutions  # self-attention and MLP; ...; vocabulary
    mel, tokens = inputs()
    expected = exact(mel, tokens)
    assert 0 < (got(mel, tokens) - expected).abs().max() < 0.05 * expected.abs().max()
    for wrong in (lambda: save_model(got, tmp_path / "again.safetensors"), got.state_dict):
        with pytest.raises(OptionError, match="load it with dtype='fp32'"):
            wrong()
    with pytest.raises((OptionError, ValueError), match=r"dtype='fp32'|has its second branch already"):
        got.add_second_branch(DualOptions())


def test_wrong_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(pair()[0], tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="for the CPU"):
        load_model(tmp_path / "model.safetensors", device="cuda:0", dtype="int8")
    with pytest.raises(OptionError, match="x86"):
        quantize_linears(pair()[0], Processor(int8=False))


@needs_int8
def test_real_speech_in_int8(base_path: Path, assets: Path) -> None:
    texts = []
    for dtype in ("fp32", "int8", "auto"):
        model = load_model(base_path, device="cpu", dtype=dtype)
        texts.append(model.transcribe(str(assets / "speech.opus"), language="en", temperature=0.0).text)
    fp32, int8, auto = map(EnglishTextNormalizer(), texts)  # a comma may come and go
    assert fp32 == int8 == auto
