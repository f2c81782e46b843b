"""Which device a model runs on, and in which type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import OptionError

DEVICE_HELP = "cuda, mps or cpu; the best there is by default"
DEVICES_HELP = f"{DEVICE_HELP}; cuda:0,cuda:1 or all: files are shared out among them"
THREADS_HELP = "CPU threads; 0 lets torch choose"
DTYPE_HELP = "auto: fp16 on a GPU; on a CPU int8, or fp32 where that has no 8-bit dot products"
DTYPE_NAMES = ("auto", "fp32", "fp16", "bf16", "int8")
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Processor:
    """What a CPU multiplies fast.

    int8: there are int8 kernels for it. vnni: it has 8-bit dot products. bf16: it has bf16 dot products. tiles: it
    multiplies tiles of bf16 (AMX), about three times as fast as fp32.
    """

    int8: bool
    vnni: bool = False
    bf16: bool = False
    tiles: bool = False

    @classmethod
    def here(cls) -> Processor:
        return cls(
            torch.backends.quantized.engine in ("x86", "fbgemm", "onednn"),
            torch.cpu._is_vnni_supported(),
            torch.cpu._is_avx512_bf16_supported(),
            torch.cpu._is_amx_tile_supported(),
        )


PROCESSOR = Processor.here()


def choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise OptionError(f"unknown device {device!r}; use cuda, cuda:1, mps or cpu") from e
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device}: torch finds {torch.cuda.device_count()} cuda devices here; use cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("device mps: torch finds none here; use cpu")
    return chosen


def choose_devices(devices: str | None, local: int | None = None) -> list[str]:
    """The devices of "cuda:0,cuda:1", of "all", or the best one; of several processes on a machine the `local`-th's."""
    count = torch.cuda.device_count()
    if devices is None and local is not None and count:
        return [f"cuda:{local % count}"]
    if devices == "all":
        return [f"cuda:{i}" for i in range(count)] or [str(choose_device(None))]
    return [str(choose_device(each)) for each in (devices.split(",") if devices else [None])]


def choose_dtype(
    dtype: str | torch.dtype | None, device: torch.device, processor: Processor = PROCESSOR
) -> torch.dtype:
    """The type of a name. None is fp16 on cuda and fp32 elsewhere: a model that can be trained and saved.

    "auto" is for inference alone: int8 (fast/int8.py) too, on a CPU with 8-bit dot products.
    """
    if dtype in (None, "auto"):
        if device.type == "cuda":
            return torch.float16
        fast = dtype == "auto" and device.type == "cpu" and processor.int8 and processor.vnni
        return torch.int8 if fast else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise OptionError(f"unknown dtype {dtype!r}; use auto, fp32, fp16, bf16, or int8 on a CPU")
    if found == torch.int8 and device.type != "cpu":
        raise OptionError(f"int8 is for the CPU, not {device}; use device='cpu', or fp16")
    assert found is not None
    return found
