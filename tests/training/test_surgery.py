"""What is frozen before training."""

from __future__ import annotations

from helpers.models import MULTILINGUAL

from dawhisper.model import DualOptions, Whisper, is_second_branch
from dawhisper.training.surgery import freeze


def test_freezing() -> None:
    model = Whisper(MULTILINGUAL, DualOptions(memory_layers=1))

    def learning() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = {name for name, _ in model.named_parameters()}
    second = {name for name in everything if is_second_branch(name)}
    assert learning() == everything
    freeze(model, ["encoder"])
    assert learning() == {n for n in everything if n.startswith("decoder.")} | {n for n in second if "encoder" in n}
    freeze(model, ["encoder", "primary"])
    assert learning() == second
    stock = {name for name, _ in Whisper(MULTILINGUAL).named_parameters()}
    assert second == everything - stock
    freeze(model, [])
    assert learning() == everything
