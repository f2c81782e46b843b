"""The processes and devices of one training run: who this one is, and the few things they must agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import OptionError


@dataclass(frozen=True)
class World:
    """This process among `size`; one process alone needs no torchrun and no process group."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Read torchrun's environment and connect: nccl between GPUs, gloo between CPUs."""
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            place = torch.device(kind)
        except RuntimeError:
            raise OptionError(f"device is {device!r}; use auto, cpu, cuda or cuda:N") from None
        if place.type == "cuda":
            if not torch.cuda.is_available():
                raise OptionError(f"device is {device!r}, but torch sees no GPU here; use device=cpu")
            if ":" not in kind:
                place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if place.index >= torch.cuda.device_count():
                raise OptionError(f"{place} does not exist: this machine has {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(place)
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            if place.type == "cuda":
                dist.init_process_group("nccl", rank=rank, world_size=size, device_id=place)
            else:
                dist.init_process_group("gloo", rank=rank, world_size=size)
        return cls(place, rank, size)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place; nothing waits for it on the host."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def average(self, tensors: list[Tensor]) -> None:
        """Each tensor's mean over all processes, in place, by one exchange."""
        if self.size > 1:
            means = self.sum(torch.cat([x.flatten() for x in tensors])) / self.size
            parts = means.split([x.numel() for x in tensors])
            torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask, and wait for one another."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of ranks, on the first one; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.main else []
        dist.gather_object(value, values if self.main else None)
        return values

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def onto(device: torch.device | str, x: Tensor) -> Tensor:
    """x on the device. A plain `.to` from the CPU would wait until the device has done all that is queued for it."""
    return x.to(device, non_blocking=True)
