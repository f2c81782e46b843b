"""Linear layers in int8 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import MULTILINGUAL, inputs, pair, trained
from whisper.normalizers import EnglishTextNormalizer

from dawhisper import DualOptions, load_model, save_model
from dawhisper.errors import OptionError
from dawhisper.fast.int8 import VNNI, Int8Linear, Int8RowsLinear

pytestmark = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn"), reason="no int8 kernels for this processor"
)


needs_vnni = pytest.mark.skipif(not VNNI, reason="no 8-bit dot products")


@pytest.mark.parametrize("kind", [Int8Linear, pytest.param(Int8RowsLinear, marks=needs_vnni)])
@torch.no_grad()
def test_each_row_keeps_its_precision(kind: type[Int8Linear]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(3, 7, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    got = kind(linear.weight, None)(x)
    expected = torch.nn.functional.linear(x, linear.weight)
    error = (got - expected).abs().amax(dim=(1, 2)) / expected.abs().amax(dim=(1, 2))
    assert (error < 0.02).all(), error
    one = kind(linear.weight, linear.bias)(x[1, :1])
    torch.testing.assert_close(one, linear(x[1, :1]), atol=0.03, rtol=0)
    assert kind(linear.weight, None)(torch.zeros(2, 64)).eq(0).all()


@needs_vnni
@torch.no_grad()
def test_one_sided_rows_use_all_codes() -> None:
    """What follows a GELU lies above -0.17: 8 bits for both signs alike would lose one of them."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 32, bias=False), torch.rand(40, 256)
    expected = linear(x)
    error = [(kind(linear.weight, None)(x) - expected).norm() for kind in (Int8Linear, Int8RowsLinear)]
    assert error[1] < 1.1 * error[0]


@pytest.mark.parametrize("dual", [None, DualOptions()], ids=["single", "dual"])
@pytest.mark.parametrize("storage", ["fp32", "int8"])
@torch.no_grad()
def test_loaded_in_int8(storage: str, dual: DualOptions | None, tmp_path: Path) -> None:
    model = trained(dual) if dual else pair()[0]
    save_model(model, tmp_path / "model.safetensors", storage)
    exact = load_model(tmp_path / "model.safetensors", device="cpu", dtype="fp32")
    got = load_model(tmp_path / "model.safetensors", device="cpu", dtype="int8")
    left = {name.rpartition(".")[0] for name, module in got.named_modules() if isinstance(module, torch.nn.Linear)}
    assert left == ({f"decoder.blocks.{i}.gate" for i in range(MULTILINGUAL.n_text_layer)} if dual else set())
    packed = [module for module in got.modules() if isinstance(module, Int8Linear | Int8RowsLinear)]
    blocks = MULTILINGUAL.n_audio_layer + MULTILINGUAL.n_text_layer
    cross = MULTILINGUAL.n_text_layer * (2 if dual else 1)
    assert len(packed) == (2 + 2) * blocks + 3 * cross + 1  # self-attention and MLP; query, memory and out; vocabulary
    mel, tokens = inputs()
    expected = exact(mel, tokens)
    assert 0 < (got(mel, tokens) - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(OptionError, match="load it as fp32"):
        save_model(got, tmp_path / "again.safetensors")


def test_wrong_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(pair()[0], tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="for the CPU"):
        load_model(tmp_path / "model.safetensors", device="cuda:0", dtype="int8")
    monkeypatch.setattr("dawhisper.fast.int8.ENGINE", "qnnpack")
    with pytest.raises(OptionError, match="x86"):
        load_model(tmp_path / "model.safetensors", device="cpu", dtype="int8")


def test_real_speech_in_int8(base_path: Path, assets: Path) -> None:
    texts = []
    for dtype in ("fp32", "int8"):
        model = load_model(base_path, device="cpu", dtype=dtype)
        texts.append(model.transcribe(str(assets / "speech.opus"), language="en", temperature=0.0).text)
    fp32, int8 = map(EnglishTextNormalizer(), texts)  # a comma may come and go
    assert fp32 == int8
