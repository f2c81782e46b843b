"""One model from several training runs: the mean of their weights. `dawhisper average`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dawhisper.checkpoint import load_model, read_config
from dawhisper.errors import OptionError
from dawhisper.files import writable_folder
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import Whisper
from dawhisper.options import option

RANDOM_START = ("gate", "noise_embed", "noise_scale")


@dataclass(frozen=True)
class AverageOptions:
    """models: dawhisper files of runs from the same start; out: the averaged file (.safetensors, fp16)."""

    models: Sequence[str] = option(help="dawhisper .safetensors files of the runs", positional=True, metavar="FILE")
    out: str = option(help="the averaged file, .safetensors", metavar="FILE")

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise OptionError("an average needs two models or more")
        if not self.out.endswith(".safetensors"):
            raise OptionError(f"--out names the averaged file, such as average.safetensors, not {self.out!r}")


def average_files(options: AverageOptions) -> str:
    """Write the averaged file; returns what was written. DawhisperError for bad input."""
    out = Path(options.out)
    writable_folder(out.parent)
    configs = [read_config(path) for path in options.models]
    model = average([load_model(path, device="cpu", dtype="fp32") for path in options.models])
    recipe = {"average": [config["recipe"] for config in configs]}
    save_model(model, out, base_model=configs[-1]["base_model"], recipe=recipe)
    return f"{out}: the mean of {len(options.models)} models"


@torch.no_grad()
def average(models: Sequence[Whisper]) -> Whisper:
    """The last model, with the mean of all models' weights: a uniform soup (Wortsman et al. 2022, arXiv:2203.05482).

    Runs from one start lie close enough together for their mean to be a good model, often a better one than each. What
    started at random (the gate, the noise embeddings and their scales) means something else in each run unless they
    share a seed, so it is taken from the last. OptionError where the models differ in shape.
    """
    last = models[-1]
    if any((model.dims, model.dual) != (last.dims, last.dual) for model in models):
        raise OptionError("models of different dimensions or second branches have no average")
    weights = [model.state_dict() for model in models]
    mean = {
        name: value if set(name.split(".")) & set(RANDOM_START) else torch.stack([w[name] for w in weights]).mean(0)
        for name, value in weights[-1].items()
    }
    last.load_state_dict(mean)
    return last
