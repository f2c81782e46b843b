"""Options are declared once: a dataclass's field has a default and a help, of which a command's parser is made."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any = MISSING, help: str = "", **how: Any) -> Any:
    """A field that the command line has too; a field without it is for Python alone.

    how: `name`, where the command line calls it otherwise; `short`, such as "-o"; `positional`; `flag`: a word of its
    own, without True or False; `append`: may be given again and again; `choices` and `metavar` as argparse's.
    """
    return field(default=default, metadata={"help": help, **how})


def add_options(parser: argparse.ArgumentParser, kind: Any, defaults: Mapping[str, Any] | None = None) -> None:
    """An argument for each option of a dataclass; `defaults` replace those of the fields."""
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if "help" in one.metadata:
            default = (defaults or {}).get(one.name, one.default)
            add_option(parser, one.name, hints[one.name], default, dict(one.metadata))


def add_option(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, how: dict[str, Any]) -> None:
    flags = [f"--{how.get('name', name)}", *([how.pop("short")] if "short" in how else [])]
    if "name" in how and not how.get("flag"):
        how.setdefault("metavar", how["name"].upper())
    how.pop("name", None)
    convert, nargs = shape(hint)
    if how.pop("positional", False):
        parser.add_argument(name, nargs="*" if nargs and default is not MISSING else nargs, type=convert, **how)
    elif how.pop("flag", False):
        flags = [f"--no_{name}"] if default else flags
        parser.add_argument(*flags, dest=name, action="store_false" if default else "store_true", **how)
    elif how.pop("append", False):
        parser.add_argument(*flags, dest=name, action="append", type=convert, **how)
    else:
        required = default is MISSING
        how |= {"required": True} if required else {"default": default}
        parser.add_argument(*flags, dest=name, nargs=nargs, type=convert, **how)


def shape(hint: Any) -> tuple[Callable[[str], Any], str | int | None]:
    """How a word becomes a value of this type, and how many words there are; of several types the first counts."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    first, inner = options[0], typing.get_args(options[0])
    if inner:  # Sequence[str], tuple[float, float] ...
        several = typing.get_origin(first) is not tuple or Ellipsis in inner
        return inner[0], "+" if several else len(inner)
    convert = boolean if first is bool else first
    return (optional(convert) if type(None) in options else convert), None


def from_parsed(kind: type[T], args: dict[str, Any]) -> T:
    """The dataclass from what was parsed; its options are taken out of `args`."""
    names = [one.name for one in dataclasses.fields(kind) if one.name in args]  # type: ignore[arg-type]
    append = {one.name for one in dataclasses.fields(kind) if one.metadata.get("append")}  # type: ignore[arg-type]
    given = {name: args.pop(name) for name in names}
    given = {name: value for name, value in given.items() if value is not None or name not in append}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def underlined(words: Sequence[str]) -> list[str]:
    """Command-line words with --batch-size as --batch_size: both are understood."""
    end = words.index("--") if "--" in words else len(words)
    made = []
    for word in words[:end]:
        name, equals, value = word.partition("=")
        made.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    return [*made, *words[end:]]


def boolean(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"True or False, not {text!r}")


def optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument that may be the word None."""

    def parse(text: str) -> Any:
        return None if text == "None" else kind(text)

    parse.__name__ = kind.__name__
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default not in (None, (), "", argparse.SUPPRESS) and action.nargs != 0
        return super()._get_help_string(action) if said else action.help
