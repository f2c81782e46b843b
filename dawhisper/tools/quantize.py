"""A model stored in int8, and what that costs: `dawhisper quantize`.

The file is that of `save_model(dtype="int8")`: weights with one scale a row, computed with in floating point after
loading, or on a CPU in int8 with `load_model(dtype="int8")`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dawhisper.audio import load_audio, log_mel_spectrogram, pad_or_trim
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL, load_model, read_config
from dawhisper.decoding import DecodingOptions, decode_windows, initial_tokens, model_tokenizer
from dawhisper.errors import OptionError
from dawhisper.files import writable_folder
from dawhisper.formats.dawhisper import save_model
from dawhisper.model import Whisper
from dawhisper.options import option

WORST = 8  # layers named in the report; the CSV has all


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantise and to measure.

    out: the int8 file (.safetensors); OUT.layers.csv beside it has the errors by layer where there is `audio`.
    audio: recordings (their first 30 s) on which the layers' outputs are compared.
    manifests, noise, kinds, snrs, limit: as of `dawhisper evaluate`: word errors before and after, in OUT.evaluation.
    """

    out: str = option(help="the int8 file, .safetensors", metavar="FILE")
    model: str = option(OWN_MODEL, MODEL_HELP)
    audio: Sequence[str] = option((), "recordings to compare the layers' outputs on", metavar="FILE")
    manifests: Sequence[str] = option((), "JSON lines with audio and text", name="manifest", metavar="MANIFEST")
    noise: Sequence[str] = option((), "recordings of noise, for the kind real", metavar="DIR")
    kinds: Sequence[str] = option((), "of noise, as of evaluate", metavar="KIND")
    snrs: Sequence[float] = option((), "20 10 5 0 -5 by default", name="snr", metavar="DB")
    limit: int | None = option(None, "only the first N utterances of each manifest", metavar="N")

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise OptionError(f"--out names the int8 file, such as model.int8.safetensors, not {self.out!r}")
        if (self.noise or self.kinds or self.snrs) and not self.manifests:
            raise OptionError("word errors in noise need speech with text: give --manifest")


@dataclass(frozen=True)
class LayerError:
    """Relative errors (norm of the difference over the norm) of one layer.

    weight: of the weights as stored; output: of what the layer gives for the exact model's inputs, with these weights.
    """

    layer: str
    weight: float
    output: float


def quantize_file(options: QuantizeOptions) -> str:
    """Write the file and what was asked to be measured; returns the report. DawhisperError for bad input."""
    out = Path(options.out)
    writable_folder(out.parent)
    if options.manifests:
        evaluation()  # raises, before the work is done
    audio = [load_audio(path) for path in options.audio]
    model = load_model(options.model, device="cpu", dtype="fp32")
    save_model(model, out, dtype="int8", **origin(options.model))
    lines = [f"{out}: {out.stat().st_size / 1e6:.1f} MB, in fp32 {_megabytes(model):.1f} MB"]
    if audio:
        mel = torch.stack([log_mel_spectrogram(pad_or_trim(x), model.dims.n_mels) for x in audio])
        errors = layer_errors(model, load_model(out, device="cpu", dtype="fp32"), mel)
        table = out.with_suffix(".layers.csv")
        write_errors(errors, table)
        lines += [describe(errors), f"all layers: {table}"]
    if options.manifests:
        lines.append(word_errors(options, out))
    return "\n".join(lines)


def origin(model: str) -> dict[str, Any]:
    """Where a model comes from, as `save_model` takes it: what its file says, or its name."""
    if model != OWN_MODEL and not (model.endswith(".safetensors") and Path(model).is_file()):
        return {"base_model": model}
    config = read_config(model)
    return {key: config[key] for key in ("base_model", "recipe")}


def _megabytes(model: Whisper) -> float:
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 1e6


# ---- errors by layer ----------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(exact: Whisper, stored: Whisper, mel: Tensor) -> list[LayerError]:
    """Errors of every layer with quantised weights, in the order of the model. mel [B, n_mels, 3000].

    Each layer of the exact model hands its input to its twin as well, so that an error is the layer's own and does
    not come from those before it. The text is what the exact model hears.
    """
    pairs = {name: m for name, m in exact.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    twins = dict(stored.named_modules())
    squares = {name: torch.zeros(2, dtype=torch.float64) for name in pairs}  # of the output, and of the difference

    def compare(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            difference = twins[name](*inputs) - output
            squares[name] += torch.stack([x.double().square().sum() for x in (output, difference)])

        return pairs[name].register_forward_hook(hook)

    tokens = heard_tokens(exact, mel)
    handles = [compare(name) for name in pairs]
    try:
        exact(mel, tokens)
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    errors = []
    for name, layer in pairs.items():
        whole, difference = squares[name].tolist()
        weight = relative(twins[name].weight, layer.weight)  # type: ignore[arg-type]
        errors.append(LayerError(name, weight, (difference / whole) ** 0.5 if whole else 0.0))
    return errors


def relative(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate - exact).norm() / exact.norm().clamp(min=1e-30))


def heard_tokens(model: Whisper, mel: Tensor) -> Tensor:
    """Prompt and text [B, n] that the model hears greedily, filled up with <|endoftext|>."""
    options = DecodingOptions(without_timestamps=True)
    rows = []
    for result in decode_windows(model, model.encode(mel), options):
        tokenizer = model_tokenizer(model, result.language, "transcribe")
        rows.append(initial_tokens(model, tokenizer, options) + result.tokens)
    n = max(map(len, rows))
    return torch.tensor([row + [tokenizer.eot] * (n - len(row)) for row in rows])


def describe(errors: Sequence[LayerError]) -> str:
    """The mean, and the layers whose outputs suffer most."""
    worst = sorted(errors, key=lambda e: -e.output)[:WORST]
    rows: list[tuple[str, ...]] = [("layer", "weights", "outputs")]
    mean = [sum(x) / len(x) for x in zip(*((e.weight, e.output) for e in errors))]
    rows.append(("mean", *(f"{100 * x:.2f}%" for x in mean)))
    rows += [(e.layer, *(f"{100 * x:.2f}%" for x in (e.weight, e.output))) for e in worst]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "relative errors; the layers with the largest ones:\n" + "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def write_errors(errors: Sequence[LayerError], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["layer", "weight", "output"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(error) for error in errors)


# ---- word errors --------------------------------------------------------------------------------------------------


def evaluation() -> Any:
    """The module of `dawhisper evaluate`. OptionError where a package that it needs is not installed."""
    try:
        from dawhisper.evaluation import run
    except ModuleNotFoundError as e:
        raise OptionError(f"word errors need {e.name}: pip install 'dawhisper[evaluate]'") from e
    return run


def word_errors(options: QuantizeOptions, out: Path) -> str:
    """Word errors in noise of the model and of the int8 file: `dawhisper evaluate` of the two."""
    run = evaluation()
    folder = out.with_suffix(".evaluation")
    models = [f"float={options.model}", f"int8={out}"]
    chosen = {"snrs": options.snrs} if options.snrs else {}
    run.evaluate(
        run.EvaluateOptions(
            manifests=options.manifests,
            models=models,
            noise=options.noise,
            kinds=options.kinds,
            limit=options.limit,
            out=str(folder),
            device="cpu",
            plots=False,
            **chosen,
        )
    )
    return f"word errors: {folder}"
