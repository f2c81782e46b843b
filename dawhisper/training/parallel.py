"""The student compiled, sharded or shared by several processes; which attention kernel runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dawhisper.distributed import World
from dawhisper.errors import OptionError
from dawhisper.fast.compile import compile_blocks

from .objective import Student, Teacher


def parallelise(
    student: Student, teacher: Teacher | None, world: World, compile: str, fsdp: bool, graph: bool = False
) -> nn.Module:
    """The student as the loop calls it: compiled, and wrapped for several processes (DistributedDataParallel or FSDP2).

    compile "encoder": the encoders' blocks, which take most of the time; one stands for all, so it compiles in seconds;
    "blocks": the decoders' too, where they are not sharded; "model": the whole forward pass, anew for each length of
    audio and text.
    graph: replayed passes exchange no gradients, so the loop does.
    """
    torch._dynamo.config.recompile_limit = 64  # one for each length of audio and text
    if compile in ("encoder", "blocks"):
        for model in [student.model] if teacher is None else [student.model, teacher.model]:
            compile_blocks(model, decoder=compile == "blocks" and not fsdp)
    parallel: nn.Module = student
    if fsdp:
        parallel = shard(student, world)
    elif world.size > 1 and not graph:
        parallel = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    if compile == "model":
        parallel.compile(dynamic=False)
        if teacher is not None:
            teacher.compile(dynamic=False)
    return parallel


def attention_kernel(name: str) -> AbstractContextManager[Any]:
    """Which kernel scaled_dot_product_attention tries first: "default" leaves it to torch, or "cudnn", "flash"."""
    if name == "default":
        return nullcontext()
    first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel([first, *(kernel for kernel in others if kernel != first)], set_priority=True)


def shard(student: Student, world: World) -> nn.Module:
    """Fully sharded: each device holds a part of every block's weights, gradients and moments (FSDP2)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not torch.distributed.is_initialized():
        raise OptionError("loop.fsdp=true needs torchrun: torchrun --nproc_per_node N train.py ...")
    model = student.model
    for block in [*model.encoder.blocks, *model.encoder.secondary_blocks, *model.decoder.blocks]:
        fully_shard(block)
        if hasattr(block, "memory"):
            register_fsdp_forward_method(block, "memory")
    fully_shard(student)
    return student
