"""scripts/deeper_control.py: a checkpoint with more encoder layers hears what it heard."""

from __future__ import annotations

import runpy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dawhisper.checkpoint import load_model
from dawhisper.model import ModelDimensions, Whisper

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "deeper_control.py"
DIMS = ModelDimensions(80, 1500, 64, 2, 3, 51865, 448, 64, 2, 2)


@pytest.mark.parametrize("more", [1, 3, 4])
def test_added_layers_change_nothing_at_first(more: int, tmp_path: Path) -> None:
    deepen = runpy.run_path(str(SCRIPT))["deepen"]
    torch.manual_seed(0)
    model = Whisper(DIMS).eval()
    checkpoint = {"dims": asdict(DIMS), "model_state_dict": model.state_dict()}
    torch.save(deepen(checkpoint, more), tmp_path / "deeper.pt")
    deeper = load_model(tmp_path / "deeper.pt", device="cpu", dtype=torch.float32)
    assert deeper.dims.n_audio_layer == len(deeper.encoder.blocks) == 3 + more
    mel = torch.randn(2, 80, 200)
    assert torch.equal(deeper.embed_audio(mel), model.embed_audio(mel))
    deeper.embed_audio(mel).sum().backward()
    for block in deeper.encoder.blocks:  # all can learn
        assert block.attn.out.weight.grad.abs().sum() > 0
