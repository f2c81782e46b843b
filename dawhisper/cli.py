"""The command line: parsing only. Each command hands its arguments to the module that does the work."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import OWN_MODEL
from .console import forgive_letters
from .errors import DawhisperError, OptionError, unforeseen
from .writers import WRITERS

INTERRUPTED = 1
MOST_THREADS = 1024
MODEL_HELP = "dawhisper's own, the name of one of OpenAI's (base, small ...), or the path of a checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dawhisper ARGV`; returns the exit code: 0 done, 1 something failed (said in one line), 2 wrong usage."""
    forgive_letters()
    parser = argparse.ArgumentParser(prog="dawhisper", description="Speech recognition that keeps its head in noise.")
    parser.add_argument("--version", action="version", version=f"dawhisper {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _transcribe_parser,
        _stream_parser,
        _serve_parser,
        _prepare_parser,
        _evaluate_parser,
        _bench_parser,
        _visualize_parser,
        _export_parser,
        _quantize_parser,
        _average_parser,
        _join_parser,
    ):
        add(commands)
    args = vars(parser.parse_args(argv))
    run: Callable[..., int] = args.pop("run")
    args.pop("command")
    warnings.showwarning = _one_line_warning
    try:
        check_numbers(args)
        return run(**args)
    except DawhisperError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 1
    except Exception as error:
        return fail(unforeseen(error))


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


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dawhisper: warning: {message}", file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dawhisper")
    except PackageNotFoundError:
        from . import __version__

        return __version__


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


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


# ----------------------------------------------------------------------------------------------------- transcribe


def _transcribe_parser(commands: Any) -> None:
    p = commands.add_parser("transcribe", help="turn recordings into text", formatter_class=_Help)
    p.set_defaults(run=_transcribe)
    add = p.add_argument
    add("audio", nargs="+", help="audio or video files")
    add("--model", default=OWN_MODEL, help=MODEL_HELP)
    add("--model_dir", help="where downloaded models are kept; ~/.cache/whisper by default")
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--output_dir", "-o", default=".", help="folder for the outputs")
    add("--output_format", "-f", default="all", choices=[*WRITERS, "all"])
    add("--verbose", type=boolean, default=True, help="True prints the text as it comes, False shows a progress bar")

    add("--task", default="transcribe", choices=["transcribe", "translate"], help="translate means into English")
    add("--language", type=optional(str), help="language spoken, by code or English name; None detects it")

    add("--temperature", type=float, default=0.0, help="temperature to sample with; 0 takes the likeliest text")
    add("--best_of", type=optional(int), default=5, help="samples at a temperature above 0; the best is kept")
    add("--beam_size", type=optional(int), default=5, help="beams at temperature 0; None decodes greedily")
    add("--patience", type=optional(float), help="beam search patience (arXiv:2204.05424); 1.0 is plain beam search")
    add("--length_penalty", type=optional(float), help="alpha of arXiv:1609.08144; None divides by the length")
    add("--suppress_tokens", default="-1", help="ids never sampled, comma-separated; -1 is most special characters")
    add("--initial_prompt", help="text before the first window: names, spelling, style")
    add("--carry_initial_prompt", type=boolean, default=False, help="prompt every window with initial_prompt")
    add("--condition_on_previous_text", type=boolean, default=True, help="prompt each window with the text before it")
    add("--fp16", type=boolean, default=True, help="compute in fp16 on a GPU; False in fp32 (a CPU always does)")
    add("--dtype", choices=["fp32", "fp16", "bf16", "int8"], help="compute in this instead; int8 is fastest on a CPU")
    add("--int8_memory", type=boolean, default=False, help="on a GPU: keep the audio's keys and values in int8, faster")

    add("--temperature_increment_on_fallback", type=optional(float), default=0.2, help="step of the fallback's retries")
    add("--compression_ratio_threshold", type=optional(float), default=2.4, help="text more repetitive is retried")
    add("--logprob_threshold", type=optional(float), default=-1.0, help="text less likely (mean log) is retried")
    add("--no_speech_threshold", type=optional(float), default=0.6, help="above it unlikely text counts as silence")
    add("--word_timestamps", type=boolean, default=False, help="times for each word")
    add("--prepend_punctuations", default="\"'“¿([{-", help="merged with the next word")
    add("--append_punctuations", default="\"'.。,，!！?？:：”)]}、", help="merged with the word before")
    add("--highlight_words", type=boolean, default=False, help="underline words as they are spoken (srt and vtt)")
    add("--max_line_width", type=optional(int), help="characters in a line of subtitles")
    add("--max_line_count", type=optional(int), help="lines in a subtitle")
    add("--max_words_per_line", type=optional(int), help="words in a subtitle")
    add("--threads", type=optional(int), default=0, help="CPU threads; 0 lets torch choose")
    add("--clip_timestamps", default="0", help="parts to transcribe: start,end,start,... in seconds")
    add("--hallucination_silence_threshold", type=optional(float), help="skip silences longer than this (seconds)")
    add("--audio_track", type=optional(int), help="which sound track of a video, counted from 1; the default one")
    add("--batch_size", type=optional(int), help="windows, of all files, decoded together; None is one after the other")
    add("--multilingual", type=boolean, default=False, help="find out the language of each window, not just the first")
    add("--vad_filter", type=boolean, default=False, help="leave out what holds no voice (better with silero-vad)")


def _transcribe(
    audio: list[str],
    model: str,
    model_dir: str | None,
    device: str | None,
    output_dir: str,
    output_format: str,
    temperature: float,
    temperature_increment_on_fallback: float | None,
    fp16: bool,
    dtype: str | None,
    int8_memory: bool,
    threads: int | None,
    highlight_words: bool,
    max_line_width: int | None,
    max_line_count: int | None,
    max_words_per_line: int | None,
    **options: Any,
) -> int:
    from .transcribe_files import WriterOptions, transcribe_files

    writing = WriterOptions(output_format, highlight_words, max_line_width, max_line_count, max_words_per_line)
    return transcribe_files(
        audio,
        model_name=model,
        download_root=model_dir,
        device=device,
        dtype=dtype or (None if fp16 else "fp32"),
        int8_memory=int8_memory,
        threads=threads or 0,
        output_dir=Path(output_dir),
        writing=writing,
        temperature=temperature,
        increment=temperature_increment_on_fallback,
        options=options,
        report=fail,
    )


# --------------------------------------------------------------------------------------------------------- stream


def _stream_parser(commands: Any) -> None:
    p = commands.add_parser(
        "stream",
        help="turn live audio into text",
        description="Hears the microphone, or s16le 16 kHz mono samples on standard input, and prints text as soon as "
        "it is final. Ctrl-C ends it.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_stream)
    add = p.add_argument
    add("--input", dest="source", default="mic", help="mic, or - for standard input")
    add("--input_device", help="which microphone: number or name; the system's by default")
    add("--model", dest="model_name", default=OWN_MODEL, help=MODEL_HELP)
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--threads", type=int, default=0, help="CPU threads; 0 lets torch choose")
    add("--json", dest="as_json", action="store_true", help="a JSON object for each update: words, segments")
    add("--language", help="language spoken, by code or English name; found out by default")
    add("--task", default="transcribe", choices=["transcribe", "translate"], help="translate means into English")
    add("--initial_prompt", help="text before the first word: names, spelling, style")
    add("--policy", default="attention", choices=["attention", "agreement"], help="when a word is final")
    add("--step", type=float, default=1.0, help="seconds of new audio between two decodings")
    add("--margin", type=float, default=0.5, help="of the policy attention: seconds that must follow a final word")
    add("--silence", type=float, default=0.8, help="seconds of pause that end a turn")
    add("--longest", type=float, default=15.0, help="seconds of audio that are decoded again")


def _stream(
    source: str,
    input_device: str | None,
    model_name: str,
    device: str | None,
    threads: int,
    as_json: bool,
    **options: Any,
) -> int:
    from dawhisper.serve.stream import StreamOptions, stream

    stream(
        model_name,
        source=source,
        input_device=input_device,
        device=device,
        threads=threads,
        as_json=as_json,
        options=StreamOptions(**options),
    )
    return 0


# ---------------------------------------------------------------------------------------------------------- serve


def _serve_parser(commands: Any) -> None:
    p = commands.add_parser(
        "serve",
        help="OpenAI's audio API, live audio and a page to try them",
        description="Serves /v1/audio/transcriptions and /v1/audio/translations as OpenAI does, live audio on the "
        "WebSocket /v1/audio/live, a page on /, /health and /metrics. SIGTERM or Ctrl-C finishes what runs.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_serve)
    add = p.add_argument
    add(
        "--model", dest="models", action="append", help=f"name, path or NAME=PATH, once a model; {OWN_MODEL} by default"
    )
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all, which needs --api_key to be safe")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--threads", type=int, default=0, help="CPU threads; 0 lets torch choose")
    add("--api_key", help="what clients must send; $DAWHISPER_API_KEY by default, which other users can't see")
    add("--batch_size", type=int, default=8, help="short clips of different requests decoded together")
    add("--max_queue", type=int, default=64, help="requests waiting or running; more are refused with 429")
    add("--max_live", type=int, default=4, help="live streams at once")
    add("--max_upload", type=float, default=100.0, help="MB of a request; more is refused with 413")
    add("--max_audio", type=float, default=7200.0, help="seconds of a recording")
    add("--upload_timeout", type=float, default=300.0, help="seconds for an upload to come; slower ones get 408")
    add("--timeout", type=float, default=600.0, help="seconds of a request")


def _serve(models: list[str] | None, api_key: str | None, **options: Any) -> int:
    try:
        from dawhisper.serve.app import ServerOptions, serve
    except ModuleNotFoundError as e:
        raise OptionError(f"serve needs {e.name}, which is not installed: pip install 'dawhisper[serve]'") from e

    key = api_key or os.environ.get("DAWHISPER_API_KEY") or None
    serve(ServerOptions(tuple(models or [OWN_MODEL]), api_key=key, **options))
    return 0


# -------------------------------------------------------------------------------------------------------- prepare


def _prepare_parser(commands: Any) -> None:
    p = commands.add_parser(
        "prepare",
        help="turn a corpus into checked manifests for training",
        description="Reads LibriSpeech, Common Voice, FLEURS and LJSpeech releases, folders of audio with .txt beside, "
        "CSV/TSV tables and manifests; checks every file; writes train/dev/test.jsonl and report.json. "
        "Stopped, it goes on where it was when it is run again.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_prepare)
    add = p.add_argument
    add("source", metavar="SOURCE", help="folder, .jsonl, .tar, .csv or .tsv")
    add("--out", required=True, metavar="DIR", help="folder for the manifests")
    add("--kind", default="speech", choices=["speech", "noise", "rir"], help="what the recordings are")
    add("--format", help="librispeech, commonvoice, fleurs, ljspeech, folder, table or manifest; found out by default")
    add("--language", help="of the speech, where the source does not tell it")
    add(
        "--split",
        nargs=3,
        type=float,
        metavar=("TRAIN", "DEV", "TEST"),
        help="shares by speaker, 0.9 0.05 0.05 for speech; the release's own splits, if it has any, unless given",
    )
    add("--untranscribed", action="store_true", help="keep speech without text, for label-free training")
    add("--min-seconds", type=float, help="drop what is shorter (0.3; impulse responses 0.01)")
    add("--max-seconds", type=float, help="drop what is longer (30; noise and impulse responses an hour)")
    add("--workers", type=int, help="processes; as many as there are cores by default")
    add("--shard", type=int, default=0, metavar="N", help="pack N clips each into tar shards; 0 leaves the files alone")
    add("--shard-codec", default="opus", choices=["opus", "flac"], help="16 kHz mono; flac decodes 5x faster")
    add("--shard-bitrate", type=int, default=32000, help="of Opus, bits per second")
    add("--label-with", metavar="MODEL", help="write what this Whisper hears as teacher_text")
    add("--device", help="of that model: cuda or cpu; the best there is by default")
    add("--batch-size", type=int, default=16, help="of that model")


def _prepare(split: list[float] | None, **options: Any) -> int:
    from dawhisper.data.prepare import PrepareOptions, prepare

    report = prepare(PrepareOptions(split=None if split is None else (split[0], split[1], split[2]), **options))
    print(report)
    return 0


# ------------------------------------------------------------------------------------------------------- evaluate


def _evaluate_parser(commands: Any) -> None:
    p = commands.add_parser(
        "evaluate",
        help="measure word errors of several models by noise and SNR",
        description="Decodes the same seeded mixtures of speech and noise with every model, and writes tables, JSON, "
        "CSV, Markdown and plots. Stopped, it goes on where it was when it is run again; under torchrun it is shared "
        "between the processes.",
        # what is not given keeps the default of EvaluateOptions
        argument_default=argparse.SUPPRESS,
    )
    p.set_defaults(run=_evaluate)
    add = p.add_argument
    add("manifests", nargs="+", metavar="MANIFEST", help="JSON lines with audio and text; or a folder with one")
    add(
        "--model",
        dest="models",
        action="append",
        required=True,
        help="name or path; openai:NAME_OR_PATH, faster:NAME_OR_PATH, hf:FOLDER for other packages; LABEL=... to label "
        "it; once for each model, the first one is what others are compared with",
    )
    add("--noise", nargs="+", metavar="DIR", help="recordings of noise, for the kinds real and noise-only")
    add("--rir", dest="rirs", nargs="+", metavar="DIR", help="room impulse responses for reverb; made up by default")
    add("--snr", dest="snrs", nargs="+", type=float, metavar="DB", help="20 10 5 0 -5 by default")
    add(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="clean white pink brown babble real reverb noise-only; all but pink and brown by default",
    )
    add("--out", metavar="DIR", help="folder for the results; evaluation by default")
    add("--limit", type=int, metavar="N", help="only the first N utterances of each manifest")
    add("--seed", type=int, help="of the mixtures and the bootstrap; 0 by default")
    add("--language", help="of all utterances; auto detects it; the manifest's by default")
    add("--batch-size", type=int, help="utterances decoded together; 16 by default")
    add("--beam-size", type=int, help="beams; greedy by default")
    add("--fallback", action="store_true", help="decode as transcribe does, with temperature fallback, one at a time")
    add("--dtype", choices=["fp32", "fp16", "bf16", "int8"], help="fp16 on a GPU and fp32 elsewhere by default")
    add("--device", help="cpu, cuda or cuda:N; a GPU if there is one by default")
    add("--normalizer", choices=["auto", "english", "basic", "none"], help="auto: by language")
    add("--bootstrap-samples", type=int, metavar="N", help="of every interval and test; 10000 by default")
    add("--write-audio", metavar="DIR", help="write the mixtures there as WAV, to listen to")
    add("--no-gates", dest="gates", action="store_false", help="leave out the gate and attention of dual models")
    add("--no-plots", dest="plots", action="store_false", help="leave out the PNGs")


def _evaluate(**options: Any) -> int:
    try:
        from dawhisper.evaluation.run import EvaluateOptions, run
    except ModuleNotFoundError as e:
        raise OptionError(f"evaluate needs {e.name}, which is not installed: pip install 'dawhisper[evaluate]'") from e

    run(EvaluateOptions(**options))
    return 0


# ---------------------------------------------------------------------------------------------------------- bench


def _bench_parser(commands: Any) -> None:
    p = commands.add_parser(
        "bench",
        help="measure speed, stage by stage and beside other packages",
        description="Times the encoder, the prompt and the tokens against the machine's own ceilings, and transcribes "
        "the same recordings with other packages in turn: speed, time to the first segment, memory and word errors.",
        # what is not given keeps the default of BenchOptions
        argument_default=argparse.SUPPRESS,
    )
    p.set_defaults(run=_bench)
    add = p.add_argument
    add("recordings", nargs="*", metavar="RECORDING", help="manifests (JSON lines or their folder) or sound files")
    add(
        "--long",
        nargs="+",
        metavar="RECORDING",
        help="the same, in batches of windows; 16 unless --batch_size is given",
    )
    add("--model", help="name or path; base by default")
    add("--against", nargs="+", metavar="PEER", help="openai-whisper faster-whisper transformers; NAME:int8 for a type")
    add("--limit", type=int, metavar="N", help="recordings of each manifest; 0, all of them, by default")
    add("--repeat", type=int, metavar="N", help="rounds of which the fastest counts; 1 by default")
    add("--batch_size", type=optional(int), help="windows decoded together; one recording at a time by default")
    add("--beam_size", type=optional(int), help="beams; greedy by default")
    add("--word_timestamps", type=boolean, help="times for each word")
    add("--language", type=optional(str), help="spoken language; en by default, None detects it")
    add("--dtype", help="of dawhisper: fp32, fp16, bf16 and what load_model takes; fp16 on a GPU, fp32 elsewhere")
    add("--device", help="cpu, cuda or cuda:N; a GPU if there is one by default")
    add("--threads", type=int, help="CPU threads; torch chooses by default")
    add("--converted", metavar="DIR", help="where the peers' formats of the model are kept")
    add("--markdown", metavar="FILE", help="write the tables there")
    add("--json", metavar="FILE", help="write all of it there")


def _bench(**options: Any) -> int:
    try:
        from dawhisper.tools.bench import BenchOptions, bench
    except ModuleNotFoundError as e:
        raise OptionError(f"bench needs {e.name}, which is not installed: pip install 'dawhisper[bench]'") from e

    bench(BenchOptions(**options))
    return 0


# ------------------------------------------------------------------------------------------------------ visualize


def _visualize_parser(commands: Any) -> None:
    p = commands.add_parser(
        "visualize",
        help="show what a model hears and where it listens",
        description="Writes one picture (HTML that can be zoomed, PNG) and its data (JSON): spectrogram, words, "
        "both attention maps and the gate. With --clean or --noise, clean and noisy side by side.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_visualize)
    add = p.add_argument
    add("audio", metavar="AUDIO", help="audio or video file; up to 30 s of it are shown")
    add("--model", default=OWN_MODEL, help=MODEL_HELP)
    add("--clean", metavar="FILE", help="the same recording without its noise: shows both, and where the noise was")
    add("--noise", metavar="FILE", help="a recording of noise to mix into AUDIO: shows it without and with the noise")
    add("--snr", type=float, default=0.0, metavar="DB", help="of that mixture")
    add("--start", type=float, default=0.0, metavar="SECONDS", help="where to begin")
    add("--text", help="what the model is made to write; by default what it hears")
    add("--language", type=optional(str), help="language spoken, by code or English name; None detects it")
    add("--layers", type=int, nargs="+", metavar="N", help="decoder layers whose attention is averaged; the upper half")
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--output_dir", "-o", default=".", help="folder for the outputs")
    add("--output_format", "-f", default="all", choices=["html", "json", "png", "all"])


def _visualize(**options: Any) -> int:
    from dawhisper.tools.visualize import VisualizeOptions, visualize

    for path in visualize(VisualizeOptions(**options)):
        print(path)
    return 0


# --------------------------------------------------------------------------------------------------------- export


def _export_parser(commands: Any) -> None:
    p = commands.add_parser(
        "export",
        help="write a model as ONNX or torch.export graphs",
        description="Writes encoder and decoder (with its cache as input and output) for other runtimes. A folder of "
        "ONNX graphs is a model for the other commands too: --model DIR.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_export)
    add = p.add_argument
    add("--model", default=OWN_MODEL, help=MODEL_HELP)
    add("--out", required=True, metavar="DIR", help="folder for the graphs and config.json")
    add("--format", default="onnx", choices=["onnx", "torch"])
    add("--dtype", default="fp32", choices=["fp32", "fp16", "int8"], help="of the weights; int8 for ONNX only")
    add("--check", nargs="+", default=(), metavar="FILE", help="recordings to compare the tokens with PyTorch's on")


def _export(**options: Any) -> int:
    from dawhisper.tools.export import ExportOptions, run

    print(run(ExportOptions(**options)))
    return 0


# ------------------------------------------------------------------------------------------------------- quantize


def _quantize_parser(commands: Any) -> None:
    p = commands.add_parser(
        "quantize",
        help="store a model in int8, and measure what that costs",
        description="Writes the int8 file, a model for the other commands. With recordings, the relative error of "
        "every layer; with a manifest, word errors before and after (as `dawhisper evaluate`).",
        formatter_class=_Help,
    )
    p.set_defaults(run=_quantize)
    add = p.add_argument
    add("--model", default=OWN_MODEL, help=MODEL_HELP)
    add("--out", required=True, metavar="FILE", help="the int8 file, .safetensors")
    add("--audio", nargs="+", default=(), metavar="FILE", help="recordings to compare the layers' outputs on")
    add(
        "--manifest", dest="manifests", nargs="+", default=(), metavar="MANIFEST", help="JSON lines with audio and text"
    )
    add("--noise", nargs="+", default=(), metavar="DIR", help="recordings of noise, for the kind real")
    add("--kinds", nargs="+", default=(), metavar="KIND", help="of noise, as of evaluate")
    add("--snr", dest="snrs", nargs="+", type=float, default=(), metavar="DB", help="20 10 5 0 -5 by default")
    add("--limit", type=int, metavar="N", help="only the first N utterances of each manifest")


def _quantize(**options: Any) -> int:
    from dawhisper.tools.quantize import QuantizeOptions, run

    print(run(QuantizeOptions(**options)))
    return 0


# -------------------------------------------------------------------------------------------------------- average


def _average_parser(commands: Any) -> None:
    p = commands.add_parser(
        "average",
        help="one model from several training runs",
        description="Writes the mean of the weights of runs from the same start; gate and noise embeddings are those "
        "of the last.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_average)
    p.add_argument("models", nargs="+", metavar="FILE", help="dawhisper .safetensors files of the runs")
    p.add_argument("--out", required=True, metavar="FILE", help="the averaged file, .safetensors")


def _average(**options: Any) -> int:
    from dawhisper.tools.average import AverageOptions, run

    print(run(AverageOptions(**options)))
    return 0


# ----------------------------------------------------------------------------------------------------------- join


def _join_parser(commands: Any) -> None:
    p = commands.add_parser(
        "join",
        help="windows of several clips, for training",
        description="Joins clips of one speaker, with pauses between them, into windows as they occur in long "
        "recordings; their manifest says when each is spoken.",
        formatter_class=_Help,
    )
    p.set_defaults(run=_join)
    add = p.add_argument
    add("manifests", nargs="+", metavar="MANIFEST", help="clips with text, or labelled by dawhisper prepare")
    add("--out", required=True, metavar="DIR", help="folder for the windows and manifest.jsonl")
    add("--seconds", type=float, nargs=2, default=(12.0, 29.0), metavar=("MIN", "MAX"), help="length of a window")
    add("--pause", type=float, nargs=2, default=(0.1, 0.8), metavar=("MIN", "MAX"), help="seconds between two clips")
    add("--seed", type=int, default=0, help="of the lengths and pauses")
    add("--workers", type=int, help="processes; default: the machine's cores")


def _join(seconds: Sequence[float], pause: Sequence[float], **options: Any) -> int:
    from dawhisper.data.join import JoinOptions, run

    print(run(JoinOptions(seconds=(seconds[0], seconds[1]), pause=(pause[0], pause[1]), **options)))
    return 0
