"""Recipes: what a file and its overrides mean, and what the user is told about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dawhisper.errors import OptionError
from dawhisper.model import DualOptions
from dawhisper.training.recipe import Recipe, differences, from_dict, read_recipe, to_dict

CONFIGS = sorted((Path(__file__).resolve().parent.parent.parent / "configs").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(OptionError) as caught:
        read_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_project_has_its_recipes() -> None:
    names = {path.stem for path in CONFIGS}
    assert {
        "base_noise",
        "fewer_errors",
        "whisper_at_rest",
        "everything",
        "stage1",
        "stage2",
        "single_branch",
        "distil",
        "tiny_cpu",
    } <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_recipe_reads_and_round_trips(path: Path) -> None:
    recipe = read_recipe(path)
    assert from_dict(to_dict(recipe)) == recipe
    assert recipe.out != Recipe().out


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1e-4, warmup: 5}\nmodel: {branch: {n_noise_embed: 4}}\nfreeze: [encoder]\n")
    recipe = read_recipe(path, ["optim.warmup=7", "data.train=a.jsonl", "loop.compile=off", "model.branch.init=random"])
    assert (recipe.optim.lr, recipe.optim.warmup) == (1e-4, 7)
    assert recipe.data.train == ("a.jsonl",) and recipe.freeze == ("encoder",)
    assert recipe.loop.compile == "off"  # a word, and no boolean as in YAML 1.1
    assert recipe.model.branch == DualOptions(n_noise_embed=4, init="random")
    assert read_recipe(path, ["data.train=[a, b]", "augment.snr=[0, 1e1]"]).data.train == ("a", "b")
    assert read_recipe(path, ["model.decoder_layers=[0, 5]"]).model.decoder_layers == (0, 5)
    assert read_recipe(path, ["model.teacher=null"]).model.teacher is None


def test_a_recipe_may_build_on_another(tmp_path: Path) -> None:
    write(tmp_path, "optim: {lr: 1, clip: 2}\nout: here\n", "base.yaml")
    recipe = read_recipe(write(tmp_path, "base: base.yaml\noptim: {lr: 3}\n"))
    assert (recipe.optim.lr, recipe.optim.clip, recipe.out) == (3.0, 2.0, "here")
    circle = write(tmp_path, "base: c.yaml\n", "c.yaml")
    assert "circle" in complaint(circle)


def test_azerbaijani_learns_from_transcripts_and_keeps_one_course_over_both_stages() -> None:
    one, two = (read_recipe(next(p for p in CONFIGS if p.stem == f"azerbaijani_stage{n}")) for n in (1, 2))
    assert "primary" not in one.freeze and not two.freeze  # the language lies in Whisper's own decoder
    assert one.data == two.data and one.data.targets.language == "az"
    assert one.objective.cross_entropy > one.objective.logits > 0
    changed = {line.split(":")[0] for line in differences(to_dict(one), to_dict(two))}
    assert {key for key in changed if key.startswith("objective")} == {"objective.encoder"}
    assert two.model.name == f"{one.out}/best.safetensors" and two.model.teacher == one.model.name


def test_the_second_stage_goes_on_from_the_first_at_lower_rates() -> None:
    one, two = (read_recipe(next(p for p in CONFIGS if p.stem == name)) for name in ("base_noise", "fewer_errors"))
    assert two.model.name == f"{one.out}/last.safetensors" and two.model.teacher == one.model.name
    assert two.objective.risk > 0 == one.objective.risk
    assert two.optim.lr < one.optim.lr and two.optim.lr_new < one.optim.lr_new and two.optim.lr_gate < one.optim.lr_gate


def test_the_control_trains_the_encoder_in_place_of_a_second_branch() -> None:
    both = {path.stem: to_dict(read_recipe(path)) for path in CONFIGS}
    changed = {line.split(":")[0] for line in differences(both["base_noise"], both["single_branch"])}
    alone = {f"objective.{name}" for name in ("gate", "primary", "hold_primary", "hold_secondary")}
    assert changed == {"out", "model.dual", "optim.lr_encoder"} | alone
    assert both["single_branch"]["optim"]["lr_encoder"] == both["base_noise"]["optim"]["lr_new"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("optim.warmpu=1", "did you mean optim.warmup?"),
        ("steps=4", "did you mean loop.steps?"),
        ("modle.name=base", "did you mean model?"),
        ("augment.noise_porb=1", "did you mean augment.noise_prob"),
        ("model.branch.gate_int=1", "did you mean model.branch.gate_init"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("loop.steps=1.5", "loop.steps must be a whole number, not 1.5"),
        ("loop.steps=true", "loop.steps must be a whole number, not True"),
        ("loop.fsdp=1", "loop.fsdp must be true or false, not 1"),
        ("optim.betas=[0.9]", "optim.betas needs 2 values, not 1"),
        ("optim=3", "optim needs keys of its own, not 3"),
        ("optim.lr", "is not an override"),
        ("optim.lr=[1", "not valid YAML"),
        ("freeze=[encodr]", "did you mean encoder?"),
        ("loop.precision=bf61", "did you mean bf16?"),
        ("loop.compile=all", "must be one of auto, off, encoder, blocks, model"),
        ("loop.steps=0", "loop.steps is 0; it must be at least 1"),
        ("objective.logits=0", "nothing teaches the decoder"),
        ("model.dual=false", "objective.gate to 0"),
        ("model.branch.init=zeros", "init"),
        ("augment.noise_prob=2", "noise_prob must lie between 0 and 1"),
        ("data.targets.text_style=upper", "text_style must be one of"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, told: str) -> None:
    assert told in complaint(write(tmp_path, ""), override)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert "cannot read the recipe" in complaint(tmp_path / "none.yaml")
    assert "not valid YAML" in complaint(write(tmp_path, "a: [1\nb: 2"))
    assert "not `key: value` lines" in complaint(write(tmp_path, "- 1\n"))
    assert read_recipe(write(tmp_path, "")) == Recipe()


def test_impossible_combinations(tmp_path: Path) -> None:
    path = write(tmp_path, "loop: {fsdp: true}\n")
    assert "optim.ema" in complaint(path, "optim.ema=0.999")
    assert "fp16" in complaint(path, "loop.precision=fp16")
    assert "loop.graph" in complaint(path, "loop.graph=true")
