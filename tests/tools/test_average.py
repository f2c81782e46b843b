"""The mean of several runs' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import trained

from dawhisper.checkpoint import load_model, read_config
from dawhisper.cli import main
from dawhisper.errors import OptionError
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import DualOptions, Whisper
from dawhisper.tools.average import RANDOM_START, average


def runs(n: int = 3) -> list[Whisper]:
    return [trained(DualOptions(memory_layers=1), seed=seed) for seed in range(n)]


def test_all_but_what_started_at_random_is_the_mean() -> None:
    models = runs()
    weights = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for name, value in average(models).state_dict().items():
        last_alone = any(part in RANDOM_START for part in name.split("."))
        expected = weights[-1][name] if last_alone else sum(w[name] for w in weights) / 3
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_mean_is_another_model() -> None:
    *others, last = runs()
    mel, tokens = torch.randn(1, 80, 3000), torch.tensor([[50258, 1, 2]])
    before = last(mel, tokens)
    assert not torch.allclose(average([*others, last])(mel, tokens), before, atol=1e-3)


def test_models_of_different_shapes_have_none() -> None:
    with pytest.raises(OptionError, match="no average"):
        average([*runs(1), trained(DualOptions())])


def test_the_command_keeps_where_the_runs_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, (model, path) in enumerate(zip(runs(2), files)):
        save_model(model, path, base_model="base", recipe={"seed": i})
    out = tmp_path / "mean.safetensors"
    assert main(["average", *files, "--out", str(out)]) == 0
    assert read_config(out)["recipe"] == {"average": [{"seed": 0}, {"seed": 1}]}
    assert read_config(out)["base_model"] == "base"
    small = tmp_path / "mean.int8.safetensors"
    assert main(["quantize", "--model", str(out), "--out", str(small)]) == 0
    assert {**read_config(small), "storage": "fp16"} == read_config(out)
    assert load_model(small, device="cpu").dual == DualOptions(memory_layers=1, init="random")
    capsys.readouterr()
    assert main(["average", files[0], "--out", str(out)]) == 1
    assert capsys.readouterr().err == "dawhisper: error: an average needs two models or more\n"
    assert main(["average", files[0], "nowhere.safetensors", "--out", str(out)]) == 1
    assert "nowhere.safetensors" in capsys.readouterr().err
