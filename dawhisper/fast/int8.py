"""A model's linear layers in the types that a CPU multiplies fastest.

A token step reads all weights for one row: there int8 is a quarter of fp32's bytes. Its weights are symmetric around
zero with one scale per output row, as in a dawhisper int8 file; activations are quantised as they come, each row by
its own range, so that what is decoded side by side is what each window gives alone, to the last bit. The hundreds of
rows of the encoder are limited by arithmetic: bf16 where the processor has tiles for it (AMX), int8 otherwise. What
lies between the products stays fp32: norms, sums, the decoder's self-attention, what the gate makes of its hidden
layer. The keys and values of the audio are bf16 where the processor multiplies that: every token reads all of them.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dawhisper.device import PROCESSOR, Processor
from dawhisper.errors import OptionError
from dawhisper.model import (
    AudioEncoder,
    AudioFeatures,
    CrossMemory,
    DecoderBlock,
    LayerNorm,
    MultiHeadAttention,
    TextDecoder,
    TokenEmbedding,
    Whisper,
)

TINY = 1e-12  # the least range of a row
MOST_ROWS = 16  # of a window: more have too many scores to be written to memory
# without 8-bit dot products the sum of two products has 16 bits: activations must then do with 7
CODES = 255 if PROCESSOR.vnni else 127
multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


class Packed(nn.Module):
    """A layer that has its weights in another form alone."""

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OptionError("a model in int8 can't be saved, trained or given a second branch; load it with dtype='fp32'")


class Int8Linear(Packed):
    """x [..., in] -> [..., out] in fp32, from weights [out, in] packed for the processor.

    The kernel has one range for all rows. Each row is brought from its own to [0, 1], and its result back: a row gives
    the same bits whatever rows lie beside it, and what is decoded together is what each gives alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        zero = torch.zeros(len(weight), dtype=torch.long)
        scale = weight.abs().amax(dim=1).clamp_(min=TINY).double() / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch means to drop such tensors, but packs nothing else
            values = torch.quantize_per_channel(weight.contiguous(), scale, zero, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(values, None)
        self.total = values.dequantize().sum(dim=1)  # the result for a row of ones
        self.bias = torch.zeros(len(weight)) if bias is None else bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # one row: the same with its range as numbers, which takes half the time
            lowest, highest = (each.item() for each in x.aminmax())
            width = max(highest - lowest, TINY)
            y = multiply((x - lowest).div_(width), 1 / CODES, 0, self.packed)
            return torch.add(torch.add(self.bias, self.total, alpha=lowest), y, alpha=width, out=y)
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        span = high.sub_(low).clamp_(min=TINY)
        y = multiply((x - low).div_(span), 1 / CODES, 0, self.packed)
        return torch.addcmul(torch.addcmul(self.bias, low, self.total), y, span, out=y)


class Int8RowsLinear(Packed):
    """Int8Linear for hundreds of rows, as the encoder has: oneDNN's kernel, which needs 8-bit dot products.

    1,500 rows, 512 to 2,048: 7.8 ms, as an Int8Linear 13.7 ms (one thread of an Intel Xeon, torch 2.11).
    Each row is divided by its scale, which brings it into [-below, 1]: another pass over the result, for rows that lie
    on one side of zero, is saved. below: 1; a quarter for what follows a GELU and lies above -0.17.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, below: float = 1.0):
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_(min=TINY) / 127
        self.packed = torch.ops.onednn.qlinear_prepack((weight / scale).round_().to(torch.int8), None)
        self.scale, self.zero = scale[:, 0], torch.zeros(len(weight), dtype=torch.long)
        self.bias = torch.zeros(len(weight)) if bias is None else bias
        self.below, self.step = below, (1 + below) / 254
        self.code_of_zero = round(below / self.step)

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale = torch.maximum(high, low.div_(-self.below)).clamp_(min=TINY)
        values = codes(torch.quantize_per_tensor(x / scale, self.step, self.code_of_zero, torch.quint8))
        y = torch.ops.onednn.qlinear_pointwise(
            *(values, self.step, self.code_of_zero, self.packed, self.scale, self.zero, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return torch.addcmul(self.bias, y, scale, out=y)


class Bf16Linear(Packed):
    """x [..., in] of any type -> [..., out] in bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias)


class Bf16Convolution(Packed):
    """A convolution as one product over its windows, [B, c, T] of any type -> [B, C, T'] in bf16.

    Positions lie before channels in memory, as the layers after it read them.
    """

    def __init__(self, conv: nn.Conv1d):
        super().__init__()
        self.width, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        self.product = Bf16Linear(conv.weight.transpose(1, 2).flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.bfloat16().transpose(1, 2), (0, 0, self.padding, self.padding))
        windows = rows.unfold(1, self.width, self.stride).transpose(2, 3).flatten(2)  # [B, T', width * c]
        return self.product(windows).transpose(1, 2)


class Fp32LayerNorm(LayerNorm):
    """The encoder's last: features are of the model's type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


Kind = type[Int8Linear] | type[Int8RowsLinear] | type[Bf16Linear]


class InplaceGELU(nn.Module):
    """GELU over its input: fresh memory for so large a result costs more than the GELU itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


def codes(x: Tensor) -> Tensor:
    """The bytes of a quantised tensor where they lie: `int_repr` copies them one by one."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage(), 0, x.shape, x.stride())


class JointSelfAttention(MultiHeadAttention):
    """A self-attention whose query, key and value are one product."""

    def __init__(self, attn: Any, kind: Kind):
        nn.Module.__init__(self)  # without the layers that it replaces
        self.n_head = attn.n_head
        self.joint = kind(*joint(attn.query, attn.key, attn.value))
        self.out = kind(attn.out.weight, attn.out.bias)  # type: ignore[assignment]

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.joint(x).chunk(3, dim=-1)
        return self.split(q), self.split(k), self.split(v)


class JointCrossAttention(MultiHeadAttention):
    """A cross-attention whose key and value are one product, of kind `memory`; its query is the block's.

    gate [g, d]: what the gate's hidden layer makes of this branch; `out` gives that too, [..., d + g].
    """

    def __init__(self, attn: Any, memory: Kind, gate: Tensor | None = None):
        nn.Module.__init__(self)  # without the layers that it replaces
        self.n_head = attn.n_head
        self.joint = memory(*joint(attn.key, attn.value))
        weight, bias = attn.out.weight, attn.out.bias
        if gate is not None:
            weight, bias = torch.cat([weight, gate @ weight]), torch.cat([bias, gate @ bias])
        self.out = Int8Linear(weight, bias)  # type: ignore[assignment]

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.joint(x).chunk(2, dim=-1)
        return self.split(k), self.split(v)


class Int8Block(DecoderBlock):
    """A block in int8, made of another in its place.

    The queries of both cross-attentions are one product. The gate's hidden layer is linear in y, p and s: its parts are
    rows of the products that make the queries, p and s.
    """

    query: Int8Linear

    def put_in_int8(self, memory: Kind) -> None:
        self.attn = JointSelfAttention(self.attn, Int8Linear)
        self.mlp = mlp_of(self.mlp, Int8Linear)
        if self.secondary_attn is None:
            self.query = Int8Linear(self.cross_attn.query.weight, self.cross_attn.query.bias)
            self.cross_attn = JointCrossAttention(self.cross_attn, memory)
            return
        hidden, _, self.gate = self.gate
        of_y, of_p, of_s = hidden.weight.chunk(3, dim=1)
        weight, bias = joint(self.cross_attn.query, self.secondary_attn.query)
        self.query = Int8Linear(torch.cat([weight, of_y]), torch.cat([bias, hidden.bias]))
        self.cross_attn = JointCrossAttention(self.cross_attn, memory, of_p)
        self.secondary_attn = JointCrossAttention(self.secondary_attn, memory, of_s)

    def queries(self, y: Tensor) -> tuple[Tensor, Tensor]:
        q = self.query(y)
        width = y.shape[-1] * (1 if self.secondary_attn is None else 2)
        return q[..., :width].unflatten(-1, (-1, y.shape[-1] // self.n_head)).transpose(1, 2), q[..., width:]

    def gated(self, y: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = p.shape[-1] - y.shape[-1]
        hidden = torch.ops.aten.gelu_(y + p[..., d:] + s[..., d:])
        # a sum instead of a product, whose kernel depends on the number of rows
        gate = (hidden * self.gate.weight).sum(dim=-1, keepdim=True).add_(self.gate.bias).sigmoid_()
        return p[..., :d], s[..., :d], gate


class Int8TokenEmbedding(TokenEmbedding):
    """Rows are looked up in fp16, as OpenAI's are stored; the output layer is int8."""

    def __init__(self, weight: Tensor):
        nn.Module.__init__(self)  # without fp32 weights
        self.output = Int8Linear(weight, None)
        self.weight = nn.Parameter(weight.half(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        return self.output(x)


class Bf16MemoryDecoder(TextDecoder):
    """A decoder whose token steps read the audio's keys and values in bf16."""

    def remember(self, features: AudioFeatures) -> list[CrossMemory]:
        return [memory.stacked(torch.bfloat16) for memory in self.memories(features)]


class ProductMemory(CrossMemory):
    """A bf16 memory that token steps read as two products.

    For one row `scaled_dot_product_attention` takes up to six times as long where there are no tiles.
    """

    def read(self, query: Tensor) -> Tensor:
        if query.shape[2] > MOST_ROWS:
            return super().read(query)
        scores = (query * query.shape[-1] ** -0.5).to(self.key.dtype) @ self.key.transpose(2, 3)
        return (scores.float().softmax(dim=-1).to(self.value.dtype) @ self.value).to(query.dtype)


class ProductMemoryDecoder(Bf16MemoryDecoder):
    """One whose token steps read them as products."""

    def remember(self, features: AudioFeatures) -> list[CrossMemory]:
        return [ProductMemory(*memory) for memory in super().remember(features)]


def quantize_linears(model: Whisper, processor: Processor = PROCESSOR) -> Whisper:
    """Put an fp32 model on the CPU into the processor's fastest types, in place. It can't be trained or saved then.

    OptionError where there are no int8 kernels for the processor.
    """
    if not processor.int8:
        raise OptionError("int8 needs an x86 processor; use fp32")
    many: Kind = Bf16Linear if processor.tiles else Int8RowsLinear if processor.vnni else Int8Linear
    model.requires_grad_(False)
    if processor.tiles:
        put_stream_in_bf16(model.encoder)
    for block in [*model.encoder.blocks, *model.encoder.secondary_blocks]:
        block.attn = JointSelfAttention(block.attn, many)
        block.mlp = mlp_of(block.mlp, many)
    for block in model.decoder.blocks:
        block.__class__ = Int8Block
        block.put_in_int8(many)  # type: ignore[operator]
    model.decoder.token_embedding = Int8TokenEmbedding(model.decoder.token_embedding.weight)
    if processor.bf16:
        model.decoder.__class__ = Bf16MemoryDecoder if processor.tiles else ProductMemoryDecoder
    return model


def put_stream_in_bf16(encoder: AudioEncoder) -> None:
    """Have an encoder hand bf16 from its convolutions to its last norm."""
    encoder.conv1, encoder.conv2 = map(Bf16Convolution, (encoder.conv1, encoder.conv2))  # type: ignore[assignment]
    for norm in (encoder.ln_post, encoder.secondary_ln_post):
        if norm is not None:
            norm.__class__ = Fp32LayerNorm


def is_quantized(model: Whisper) -> bool:
    return isinstance(model.decoder.token_embedding, Int8TokenEmbedding)


def mlp_of(mlp: Any, kind: Kind) -> nn.Sequential:
    first, _, last = mlp
    after = (
        Int8RowsLinear(last.weight, last.bias, below=0.25) if kind is Int8RowsLinear else kind(last.weight, last.bias)
    )
    return nn.Sequential(kind(first.weight, first.bias), InplaceGELU(), after)


def joint(*linears: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of several linear layers over one input."""
    weight = torch.cat([linear.weight for linear in linears])
    biases: list[Tensor] = [
        weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
    ]
    return weight, torch.cat(biases)
