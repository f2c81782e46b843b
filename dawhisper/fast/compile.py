"""torch.compile for what lies between the matrix products of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dawhisper.model import AudioEncoder, AudioFeatures, CrossMemory, TextDecoder, Whisper


def compile_blocks(model: Whisper, decoder: bool = False) -> None:
    """Have torch.compile fuse what lies between the matrix products of the encoder; of the decoder, for training.

    The first use of each shape takes some seconds longer; it pays in long runs on a GPU. One block stands for all.
    """
    blocks = [*model.encoder.blocks, *model.encoder.secondary_blocks]
    model.encoder.mix = torch.compile(AudioEncoder.mix)  # type: ignore[method-assign]
    if decoder:
        blocks += model.decoder.blocks
        model.decoder.memories = memories_at_once(model.decoder)  # type: ignore[method-assign, assignment]
    for block in blocks:
        block.compile()


class Memories(nn.Module):
    """Every layer's keys and values of the audio: the gradients that all layers give to it are summed in one go.

    They are given `transposed`: gradients of what a compiled module gives are wanted contiguous, and would be copied.
    """

    def forward(self, blocks: nn.ModuleList, features: AudioFeatures, noise_embed: Tensor | None) -> list[CrossMemory]:
        return [transposed(block.memory(features, noise_embed)) for block in blocks]  # type: ignore[operator]


def memories_at_once(decoder: TextDecoder) -> Callable[[AudioFeatures], Iterable[CrossMemory]]:
    """`TextDecoder.memories`, compiled where there are gradients."""
    every, one_by_one = Memories(), decoder.memories
    every.compile()

    def memories(features: AudioFeatures) -> Iterable[CrossMemory]:
        if not torch.is_grad_enabled():
            return one_by_one(features)
        return [transposed(memory) for memory in every(decoder.blocks, features, decoder.noise_embed)]

    return memories


def transposed(memory: CrossMemory) -> CrossMemory:
    """With positions before heads, [B, T, h, e], as they lie in memory; and back."""
    secondary, noise = (
        None if pair is None else (pair[0].transpose(1, 2), pair[1].transpose(1, 2))
        for pair in (memory.secondary, memory.noise)
    )
    return CrossMemory(memory.key.transpose(1, 2), memory.value.transpose(1, 2), secondary, noise)
