"""Commands' parsers are made from their options: spellings, defaults, and what becomes of the words."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from dawhisper import cli
from dawhisper.checkpoint import OWN_MODEL
from dawhisper.errors import OptionError
from dawhisper.options import add_options, from_parsed, option, underlined


@dataclass(frozen=True)
class Asked:
    files: tuple[str, ...] = option(help="which", positional=True)
    batch_size: int = option(16, "together")
    layers: tuple[int, ...] | None = option(None, "of the decoder")
    shares: tuple[float, float] = option((0.9, 0.1), "of the parts")
    words: bool = option(False, "times of words")
    plots: bool = option(True, "leave out the pictures", flag=True)
    models: tuple[str, ...] = option(("own",), "whose", name="model", append=True)
    gates: bool = False  # for Python alone


def parsed(*words: str) -> Asked:
    parser = argparse.ArgumentParser()
    add_options(parser, Asked)
    return from_parsed(Asked, vars(parser.parse_args(underlined(words))))


def test_words_become_options() -> None:
    assert parsed("a") == Asked(("a",))
    given = parsed("a", "b", "--batch_size", "2", "--layers", "1", "3", "--shares", "0.5", "0.5", "--words", "True")
    assert given == Asked(("a", "b"), 2, (1, 3), (0.5, 0.5), True)
    assert parsed("a", "--no_plots", "--model", "x", "--model", "y") == Asked(("a",), plots=False, models=("x", "y"))


def test_both_spellings_are_understood() -> None:
    for words in (["--batch-size", "3"], ["--batch_size", "3"], ["--batch-size=3"], ["--batch_size=3"]):
        assert parsed("a", *words).batch_size == 3
    assert underlined(["--a-b=c-d", "-o", "e-f", "--", "--g-h"]) == ["--a_b=c-d", "-o", "e-f", "--", "--g-h"]


@pytest.mark.parametrize(
    "words", [["a", "--gates", "True"], ["a", "--words"], ["a", "--words", "yes"], ["a", "--shares", "1"]]
)
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_each_command_has_help_and_the_same_model(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        options: Any = getattr(cli.module_of(command), command.options)
    except OptionError as error:  # its extra is not installed
        pytest.skip(str(error))
    with pytest.raises(SystemExit) as stop:
        cli.main([command.name, "--help"])
    assert stop.value.code == 0 and "usage: dawhisper" in capsys.readouterr().out
    fields = {field.name: field for field in dataclasses.fields(options)}
    assert all(field.metadata["help"] for field in fields.values() if "help" in field.metadata)
    if "model" in fields:
        assert fields["model"].default == OWN_MODEL
    elif "models" in fields and command.name != "average":  # of files, which have no default
        assert fields["models"].default == (OWN_MODEL,)
