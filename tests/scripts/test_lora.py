"""scripts/lora.py: the adapter that it trains is the same model for dawhisper, for peft and in its own file."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from helpers.command_line import run_script
from helpers.training import ROOT, arguments, curve

from dawhisper.checkpoint import load_model
from dawhisper.formats.huggingface import hide_broken_torchaudio, to_transformers

pytest.importorskip("transformers")
hide_broken_torchaudio()
peft = pytest.importorskip("peft")
SCRIPT = ROOT / "scripts" / "lora.py"


def test_an_adapter_is_the_model_that_was_trained(world: dict[str, Path], tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    assert run_script(SCRIPT, *arguments(world, tmp_path, "loop.variable_ctx=1.0"), "--rank", 4) == 0
    assert len(curve(tmp_path)) == 4
    stock = load_model(world["model"], device="cpu", dtype=torch.float32)
    model = load_model(tmp_path / "last.safetensors", device="cpu", dtype=torch.float32)
    loaded = load_model(tmp_path / "adapter", device="cpu", dtype=torch.float32)
    assert model.variable_audio_ctx and model.dual is None
    changed = {
        name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, stock.state_dict()[name])
    }
    assert changed == {name for name in stock.state_dict() if name.endswith(("query.weight", "value.weight"))}

    to_transformers(stock, tmp_path / "stock")
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path / "stock")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    mel, tokens = torch.randn(2, 80, 200), torch.randint(50000, (2, 5))
    with torch.no_grad():
        want = theirs(input_features=mel, decoder_input_ids=tokens).logits
        got = loaded(mel, tokens)
        assert not torch.allclose(stock(mel, tokens), want, atol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(mel, tokens), got, atol=5e-2, rtol=0)  # its file holds fp16


def test_names_are_those_of_transformers() -> None:
    adapter_name = runpy.run_path(str(SCRIPT))["adapter_name"]
    want = "base_model.model.model.decoder.layers.3.encoder_attn.q_proj.lora_A.weight"
    assert adapter_name("decoder.blocks.3.cross_attn.query.lora_A.weight") == want
