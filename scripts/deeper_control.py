"""A stock checkpoint with more encoder layers: the single-branch control with as many weights as the dual model.

    python scripts/deeper_control.py base.pt deeper.pt --layers 8
    python train.py configs/single_branch.yaml model.name=deeper.pt model.teacher=base.pt ...

The added layers are copies of the ones they follow, with the last product of each residual branch at zero: at first
they change nothing (block expansion, arXiv:2401.02415), so that the control starts as Whisper, as the dual model does.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

ZERO = ("attn.out.weight", "attn.out.bias", "mlp.2.weight", "mlp.2.bias")


def deepen(checkpoint: dict, more: int) -> dict:
    """OpenAI's checkpoint with `more` encoder layers, evenly spread and the last ones first."""
    old = checkpoint["dims"]["n_audio_layer"]
    copies = [1 + (more + layer) // old for layer in range(old)]  # of each layer, itself among them
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint["model_state_dict"].items():
        found = re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", name)
        if not found:
            state[name] = tensor
            continue
        layer, part = int(found[1]), found[2]
        first = sum(copies[:layer])
        for i in range(copies[layer]):
            state[f"encoder.blocks.{first + i}.{part}"] = torch.zeros_like(tensor) if i and part in ZERO else tensor
    return {"dims": checkpoint["dims"] | {"n_audio_layer": old + more}, "model_state_dict": state}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="OpenAI's .pt file")
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=8, help="how many to add; 8 make of base the dual base's size")
    options = parser.parse_args()
    deeper = deepen(torch.load(options.source, map_location="cpu", weights_only=True), options.layers)
    torch.save(deeper, options.target)
    print(f"{options.target}: {sum(t.numel() for t in deeper['model_state_dict'].values()):,} weights")


if __name__ == "__main__":
    main()
