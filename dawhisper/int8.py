"""Linear layers in int8 for CPUs: a quarter of fp32's bytes, multiplied by the processor's 8-bit instructions.

Weights are symmetric around zero with one scale per output row, as in a dawhisper int8 file; activations are quantised
as they come. Everything between the matrix products stays fp32: norms, attention, gate and convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import OptionError
from .model import MultiHeadAttention, Whisper

ENGINE = torch.backends.quantized.engine
# without 8-bit dot products the sum of two products has 16 bits: activations must then do with 7
REDUCE_RANGE = not torch.cpu._is_vnni_supported()


class Int8Linear(nn.Module):
    """x [..., in] -> [..., out] in fp32, from weights [out, in] packed for the processor."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        zero = torch.zeros(len(weight), dtype=torch.long)
        values = torch.quantize_per_channel(weight.contiguous(), scale.double(), zero, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(values, None)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        # The kernel has one scale for all rows. Brought to the same range, no row suffers from a louder one: in noise
        # the encoder's word errors rise by 40% otherwise.
        rows = x.numel() // x.shape[-1]
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) if rows > 1 else None
        y = torch.ops.quantized.linear_dynamic(x if largest is None else x / largest, self.packed, REDUCE_RANGE)
        if largest is not None:
            y *= largest
        return y if self.bias is None else y.add_(self.bias)


def quantize(model: Whisper) -> Whisper:
    """Put the linear layers of an fp32 model on the CPU into int8, in place. It can't be trained or saved then.

    OptionError where there are no int8 kernels for the processor.
    """
    if ENGINE not in ("x86", "fbgemm", "onednn"):
        raise OptionError("int8 needs an x86 processor; use fp32")

    def packed(linear: nn.Linear) -> Int8Linear:
        return Int8Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    for block in [*model.encoder.blocks, *model.encoder.secondary_blocks, *model.decoder.blocks]:
        for part in [block.mlp, *(m for m in block.modules() if isinstance(m, MultiHeadAttention))]:
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, packed(linear))
    embedding = model.decoder.token_embedding
    model.decoder.output = Int8Linear(embedding.weight.detach(), None)
    embedding.half()  # its rows are looked up alone; OpenAI's are fp16 in the file
    return model
