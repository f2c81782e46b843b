"""Linear layers in int8 for CPUs: a quarter of the bytes of fp32, and products in the processor's 8-bit instructions.

Weights are symmetric around zero with one scale per output row, as in a dawhisper int8 file; activations are quantised
as they come, with one scale per call. Everything between the matrix products stays fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import OptionError
from .model import Whisper

VNNI = torch.cpu._is_vnni_supported()


class Int8Linear(nn.Module):
    """x [..., in] -> [..., out] in fp32, from weights [out, in] packed for the processor."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        zero = torch.zeros(len(weight), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.bias = bias
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def forward(self, x: Tensor) -> Tensor:
        # rows are brought to one range, since the kernel takes one scale for all of them
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        # without 8-bit dot products the sums of two products have 16 bits: activations must then do with 7
        y = torch.ops.quantized.linear_dynamic(x / largest, self.packed, reduce_range=not VNNI)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)


def quantize(model: Whisper, encoder: bool = True) -> Whisper:
    """Put the linear layers of an fp32 model on the CPU into int8, in place; such a model can't be trained or saved.

    OptionError where the processor has no int8 kernels.
    """
    if torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn"):
        raise OptionError("int8 needs an x86 processor; use fp32")
    for block in [*(model.encoder.blocks if encoder else ()), *model.decoder.blocks]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.out_features % 8 == 0:
                    setattr(parent, name, Int8Linear(child.weight.detach(), None if child.bias is None else child.bias.detach()))
    model.decoder.output = Int8Linear(model.decoder.token_embedding.weight.detach(), None)
    return model
