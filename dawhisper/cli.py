"""The command line: a table of commands, whose parsers are made from their options when they are asked for."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .console import forgive_letters, warn_in_one_line
from .decoding import DecodingOptions
from .errors import DawhisperError, OptionError, unforeseen
from .options import Help, add_options, from_parsed, underlined
from .transcription import TranscribeOptions
from .vad import VadOptions

INTERRUPTED = 1
MOST_THREADS = 1024


@dataclass(frozen=True)
class Command:
    """`function` of `module` takes an `options` of the same module; what it returns is printed where `prints`."""

    name: str
    module: str
    options: str
    function: str
    help: str
    description: str = ""
    extra: str = ""  # of the package, that has what it needs
    prints: bool = False


COMMANDS = (
    Command("transcribe", "transcribe_files", "FilesOptions", "transcribe_files", "turn recordings into text"),
    Command(
        *("align", "alignment", "AlignOptions", "align_file", "when each word of a given text is spoken"),
        "Finds the times of a text's words in its recording, of any length, and writes them as transcribe does.",
        prints=True,
    ),
    Command(
        *("stream", "serve.listen", "ListenOptions", "stream", "turn live audio into text"),
        "Hears the microphone, or s16le 16 kHz mono samples on standard input, and prints text as soon as it is final. "
        "Ctrl-C ends it.",
    ),
    Command(
        *("serve", "serve.server", "ServerOptions", "serve", "OpenAI's audio API, live audio and a page to try them"),
        "Serves /v1/audio/transcriptions, /v1/audio/translations and the WebSocket /v1/realtime as OpenAI does, a page "
        "on /, /docs, /health and /metrics. SIGTERM or Ctrl-C finishes what runs.",
        extra="serve",
    ),
    Command(
        *("prepare", "data.prepare", "PrepareOptions", "prepare", "turn a corpus into checked manifests for training"),
        "Reads LibriSpeech, Common Voice, FLEURS and LJSpeech releases, folders of audio with .txt beside, CSV/TSV "
        "tables and manifests; checks every file; writes train/dev/test.jsonl and report.json. Stopped, it goes on "
        "where it was when it is run again.",
        prints=True,
    ),
    Command(
        *("evaluate", "evaluation.run", "EvaluateOptions", "evaluate"),
        "measure word errors of several models by noise and SNR",
        "Decodes the same seeded mixtures of speech and noise with every model, and writes tables (text, JSON, CSV, "
        "Markdown, LaTeX) and plots. Stopped, it goes on where it was when it is run again; under torchrun it is "
        "shared between the processes.",
        extra="evaluate",
    ),
    Command(
        *("bench", "tools.bench", "BenchOptions", "bench", "measure speed, stage by stage and beside other packages"),
        "Times the encoder, the prompt and the tokens against the machine's own ceilings, and transcribes the same "
        "recordings with other packages in turn: speed, time to the first segment, memory and word errors.",
        extra="bench",
    ),
    Command(
        *("visualize", "tools.visualize", "VisualizeOptions", "visualize"),
        "show what a model hears and where it listens",
        "Writes one picture (HTML that can be zoomed, PNG) and its data (JSON): spectrogram, words, both attention "
        "maps and the gate. With --clean or --noise, clean and noisy side by side.",
        prints=True,
    ),
    Command(
        *("export", "tools.export", "ExportOptions", "export_files", "write a model as ONNX or torch.export graphs"),
        "Writes encoder and decoder (with its cache as input and output) for other runtimes. A folder of ONNX graphs "
        "is a model for the other commands too: --model DIR.",
        prints=True,
    ),
    Command(
        *("quantize", "tools.quantize", "QuantizeOptions", "quantize_file"),
        "store a model in int8, and measure what that costs",
        "Writes the int8 file, a model for the other commands. With recordings, the relative error of every layer; "
        "with a manifest, word errors before and after (as `dawhisper evaluate`).",
        prints=True,
    ),
    Command(
        *("average", "tools.average", "AverageOptions", "average_files", "one model from several training runs"),
        "Writes the mean of the weights of runs from the same start; gate and noise embeddings are those of the last.",
        prints=True,
    ),
    Command(
        *("join", "data.join", "JoinOptions", "join_clips", "windows of several clips, for training"),
        "Joins clips of one speaker, with pauses between them, into windows as they occur in long recordings; their "
        "manifest says when each is spoken.",
        prints=True,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dawhisper ARGV`; returns the exit code: 0 done, 1 something failed (said in one line), 2 wrong usage."""
    forgive_letters()
    warn_in_one_line()
    words = underlined(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="dawhisper", description="Speech recognition that keeps its head in noise.")
    parser.add_argument("--version", action="version", version=f"dawhisper {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    try:
        for command in COMMANDS:
            made = subparsers.add_parser(
                command.name, help=command.help, description=command.description, formatter_class=Help
            )
            if command.name == asked:
                add_command(made, command)
        args = vars(parser.parse_args(words))
        check_numbers(args)
        name = args.pop("command")
        return call(next(command for command in COMMANDS if command.name == name), args)
    except DawhisperError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 1
    except Exception as error:
        return fail(unforeseen(error))


def module_of(command: Command) -> Any:
    """The command's module. OptionError where a package that it needs is not installed."""
    try:
        return importlib.import_module(f"dawhisper.{command.module}")
    except ModuleNotFoundError as e:
        if not command.extra:
            raise
        raise OptionError(
            f"{command.name} needs {e.name}, which is not installed: pip install 'dawhisper[{command.extra}]'"
        ) from e


def add_command(parser: argparse.ArgumentParser, command: Command) -> None:
    """The command's options; `transcribe` has those of writers and windows too, with openai-whisper's defaults."""
    module = module_of(command)
    add_options(parser, getattr(module, command.options))
    if command.name == "transcribe":
        add_options(parser, module.WriterOptions)
        add_options(parser, TranscribeOptions, {"verbose": True})
        add_options(parser, VadOptions)
        add_options(parser, DecodingOptions, {"best_of": 5, "beam_size": 5})


def call(command: Command, args: dict[str, Any]) -> int:
    """Call the command's function with what was parsed; the exit code."""
    module = module_of(command)
    function, options = getattr(module, command.function), from_parsed(getattr(module, command.options), args)
    if command.name == "transcribe":
        args["vad_parameters"] = asdict(from_parsed(VadOptions, args))
        return function(options, from_parsed(module.WriterOptions, args), args, fail)
    result = function(options)
    if command.prints:
        print(*(result if isinstance(result, list) else [result]), sep="\n")
    return 0


def check_numbers(args: dict[str, Any]) -> None:
    """OptionError for what no option takes: nan, inf, and threads below 0."""
    for name, value in args.items():
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise OptionError(f"--{name} takes a number, not {number}")
    if not 0 <= (args.get("threads") or 0) <= MOST_THREADS:
        raise OptionError(f"--threads is 0, which lets torch choose, to {MOST_THREADS}; not {args['threads']}")


def fail(message: str, code: int = 1) -> int:
    print(f"dawhisper: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dawhisper")
    except PackageNotFoundError:
        from . import __version__

        return __version__
