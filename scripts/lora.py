"""A LoRA adapter for stock Whisper, by a recipe's lessons: what a second branch is to be compared with.

    pip install peft
    python scripts/lora.py configs/whisper_at_rest.yaml model.name=base.pt data.train=... data.noise=... out=runs/lora

The same data, noise, teacher and loop as train.py's, but one branch, and low-rank changes of the queries and values of
all attentions in place of its weights. `out` gets adapter/, which dawhisper and, with peft, transformers load, and
last.safetensors, the model with the adapter in it. There is no resuming, no evaluation on the way and one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dawhisper.distributed import World
from dawhisper.errors import DawhisperError
from dawhisper.formats.adapter import PREFIX, merged
from dawhisper.formats.dawhisper import save_model
from dawhisper.formats.huggingface import hide_broken_torchaudio, openai_name, transformers_name
from dawhisper.training.log import Log
from dawhisper.training.optimizer import make_optimizer
from dawhisper.training.recipe import read_recipe, to_dict
from dawhisper.training.run import Run, dry_run_report
from train import take_step

LAYERS = {"query": "q_proj", "value": "v_proj"}  # as in PEFT's own recipe for Whisper; theirs by transformers' names
ONE_BRANCH = ("model.dual=false", "freeze=[]", "optim.lr=1e-3", "optim.ema=0") + tuple(
    f"objective.{name}=0" for name in ("gate", "primary", "hold_primary", "hold_secondary")
)


def train(config: str, overrides: Sequence[str], rank: int) -> None:
    """Run the recipe to its end, and write the adapter and its model."""
    hide_broken_torchaudio()
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    recipe = read_recipe(config, [*ONE_BRANCH, *overrides])
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=list(LAYERS))
    world = World.join(recipe.device)
    run = Run(recipe, world)
    start = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    inject_adapter_in_model(lora, run.model)  # which leaves the adapter alone to be trained
    run.optimizer = make_optimizer(run.student, recipe.optim)
    run.parameters = [p for group in run.optimizer.param_groups for p in group["params"]]

    log = Log(recipe, run.model, world, run.step, run.amp)
    log.say(f"{run.describe()}\nof rank {rank}: {sum(p.numel() for p in run.parameters):,} weights learn")
    steps = 2 if recipe.dry_run else recipe.loop.steps
    while run.step < steps:
        log.go_on()
        take_step(run, log)
        if run.step % recipe.loop.log_every == 0 or run.step == steps:
            log.write(run.step, run.optimizer, run.bad_steps, run.batches)
    run.batches.close()
    log.close()
    world.leave()
    if recipe.dry_run:
        print(dry_run_report(world))
        return
    adapter = {adapter_name(name): tensor.cpu() for name, tensor in get_peft_model_state_dict(run.model).items()}
    config_of_it = dataclasses.replace(
        lora, target_modules=list(LAYERS.values()), base_model_name_or_path=recipe.model.name
    )
    folder = run.out / "adapter"
    write_adapter(folder, config_of_it, adapter)
    model = run.plain_model()
    model.load_state_dict(merged(str(folder), config_of_it.to_dict(), adapter, start, openai_name))
    made = {"recipe": to_dict(recipe), "lora": rank}
    save_model(model, run.out / "last.safetensors", base_model=recipe.model.name, recipe=made)


def adapter_name(name: str) -> str:
    """encoder.blocks.0.attn.query.lora_A.weight -> its name in an adapter for transformers' Whisper."""
    layer, part, _ = name.rsplit(".", 2)
    return f"{PREFIX}model.{transformers_name(layer)}.{part}.weight"


def write_adapter(folder: Path, config: object, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    try:
        train(options.config, options.overrides, options.rank)
    except DawhisperError as error:
        sys.exit(f"lora: error: {error}")


if __name__ == "__main__":
    main()
