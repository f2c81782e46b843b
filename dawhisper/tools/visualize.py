"""What a model heard, as one picture: spectrogram, words, the gate and both attention maps over one time axis.

`look` gives the numbers, `write_views` their files: JSON, a page that can be zoomed (HTML, nothing is fetched), PNG,
and a PNG of the gate alone.
W words, T encoder positions of 20 ms, L decoder layers.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND, N_SAMPLES, SAMPLE_RATE, TOKENS_PER_SECOND
from whisper.timing import merge_punctuations
from whisper.tokenizer import Tokenizer

from dawhisper.audio import load_audio, log_mel_spectrogram, pad_or_trim
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL, load_model
from dawhisper.decoding import DecodingOptions, decode_windows, language_code, model_tokenizer
from dawhisper.device import DEVICE_HELP
from dawhisper.errors import AudioError, OptionError
from dawhisper.files import writable_folder
from dawhisper.model import AudioFeatures, Whisper
from dawhisper.noise.mixing import add_noise
from dawhisper.options import option
from dawhisper.timing import Word, find_alignment
from dawhisper.trace import Trace
from dawhisper.training.losses import noise_dominance
from dawhisper.transcription import TranscribeOptions

PICTURE_FORMATS = ("html", "json", "png")
GATE_ALONE = "gate.png"  # a fourth format, written where it is asked for
JSON_VERSION = 1
SAME_SPEECH = 0.05  # correlation of a recording and its clean version: 0.3 at -10 dB, less where they don't belong


@dataclass(frozen=True)
class VisualizeOptions:
    """What to look at.

    audio: a recording of which up to 30 s are shown, from `start` seconds on.
    clean: the same recording without its noise; or noise: a recording to be mixed into `audio` at `snr` dB. Either
        one gives a picture of both, and where the noise truly was.
    text: what the model is made to write; None: what it hears. language: None detects it.
    layers: decoder layers whose attention is averaged; None: the upper half, where words are followed best.
    """

    audio: str = option(help="audio or video file; up to 30 s of it are shown", positional=True, metavar="AUDIO")
    model: str = option(OWN_MODEL, MODEL_HELP)
    clean: str | None = option(
        None, "the same recording without its noise: shows both, and where the noise was", metavar="FILE"
    )
    noise: str | None = option(
        None, "a recording of noise to mix into AUDIO: shows it without and with the noise", metavar="FILE"
    )
    snr: float = option(0.0, "of that mixture", metavar="DB")
    start: float = option(0.0, "where to begin", metavar="SECONDS")
    text: str | None = option(None, "what the model is made to write; by default what it hears")
    language: str | None = option(None, "language spoken, by code or English name; None detects it")
    layers: Sequence[int] | None = option(
        None, "decoder layers whose attention is averaged; the upper half", metavar="N"
    )
    device: str | None = option(None, DEVICE_HELP)
    output_dir: str = option(".", "folder for the outputs", short="-o")
    output_format: str = option("all", "what is written", short="-f", choices=[*PICTURE_FORMATS, GATE_ALONE, "all"])

    def __post_init__(self) -> None:
        if self.clean and self.noise:
            raise OptionError("clean and noise can't be given together: either the noise is in the recording, or not")
        if self.start < 0:
            raise OptionError(f"start is 0 or more seconds, not {self.start}")
        formats = ("all", *PICTURE_FORMATS, GATE_ALONE)
        if self.output_format not in formats:
            raise OptionError(f"unknown format {self.output_format!r}; use {', '.join(formats)}")


@dataclass(frozen=True)
class View:
    """A recording as a model heard it; times in seconds from its own start.

    primary, secondary: attention [W, T] while a word was written, mean over heads and chosen layers, each row summing
        to 1; gate: the primary branch's share a, [W, L]. secondary and gate are None for single-branch models.
    noise: the noise's true share of the energy at each position [T], None where it is not known.
    """

    title: str
    text: str
    language: str
    seconds: float
    spectrogram: Tensor  # [n_mels, frames of 10 ms], log-mel as the model gets it
    words: list[Word]
    primary: Tensor
    secondary: Tensor | None = None
    gate: Tensor | None = None
    noise: Tensor | None = None

    def on_noise(self, attention: Tensor) -> float:
        """Share of an attention map [W, T] that falls where noise is louder than speech."""
        assert self.noise is not None
        return float((attention * (self.noise > 0.5)).sum() / attention.sum())


def visualize(options: VisualizeOptions) -> list[Path]:
    """Look at the recording (or pair) and write the files; returns their paths. DawhisperError for bad input."""
    folder = Path(options.output_dir)
    writable_folder(folder)
    recordings = read_recordings(options)
    model = load_model(options.model, device=options.device)
    views = [look(model, audio, title, options, noise) for title, audio, noise in recordings]
    return write_views(views, Path(options.model).stem, folder / Path(options.audio).stem, options.output_format)


# ---- recordings ---------------------------------------------------------------------------------------------------


def read_recordings(options: VisualizeOptions) -> list[tuple[str, np.ndarray, Tensor | None]]:
    """Title, samples and true noise share [T] of each: the recording, or the clean one and the noisy one."""

    def read(path: str, start: float = options.start) -> np.ndarray:
        return load_audio(path, start=start, end=start + N_SAMPLES / SAMPLE_RATE)

    audio = read(options.audio)
    name = Path(options.audio).name
    if options.clean:
        clean = pad_or_trim(read(options.clean), len(audio))
        speech = clean * gain_of(clean, audio, options)
        return [(Path(options.clean).name, clean, None), (name, audio, noise_share(speech, audio - speech))]
    if options.noise:
        mixed, noise = mixed_at(audio, read(options.noise, 0.0), options.snr)
        title = f"{name} with {Path(options.noise).name} at {options.snr:g} dB"
        return [(name, audio, None), (title, mixed, noise_share(audio, noise))]
    return [(name, audio, None)]


def gain_of(clean: np.ndarray, noisy: np.ndarray, options: VisualizeOptions) -> float:
    """How loud the clean recording is within the noisy one, by least squares."""
    power = float(clean @ clean)
    if power == 0:
        raise AudioError(f"{options.clean}: it is silent; give the speech without its noise")
    product = float(clean @ noisy)
    if product < SAME_SPEECH * (power * float(noisy @ noisy)) ** 0.5:
        raise AudioError(
            f"{options.audio} does not hold the speech of {options.clean}: they must be the same recording, "
            "starting at the same moment, with and without noise"
        )
    return product / power


def mixed_at(speech: np.ndarray, noise: np.ndarray, snr: float) -> tuple[np.ndarray, np.ndarray]:
    """The mixture at `snr` dB and the noise in it, the noise repeated where it is too short."""
    if not noise.any():
        raise AudioError("the recording of noise is silent; give another one")
    looped = torch.from_numpy(np.resize(noise, len(speech)))[None]
    lengths = torch.tensor([len(speech)])
    mixed, scaled = add_noise(torch.from_numpy(speech)[None], looped, torch.tensor([snr]), lengths)
    return mixed[0].numpy(), scaled[0].numpy()


def noise_share(speech: np.ndarray, noise: np.ndarray) -> Tensor:
    """The noise's share of the energy per encoder position [T]."""
    positions = n_positions(len(speech))
    return noise_dominance(torch.from_numpy(speech)[None], torch.from_numpy(noise)[None], positions)[0]


def n_positions(n_samples: int) -> int:
    """Encoder positions that hold audio, the last one perhaps in part."""
    return -(-n_samples * TOKENS_PER_SECOND // SAMPLE_RATE)


# ---- looking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(model: Whisper, audio: np.ndarray, title: str, options: VisualizeOptions, noise: Tensor | None = None) -> View:
    """Hear up to 30 s of samples [n] and record what the decoder attended to; AudioError where no word is heard."""
    mel = log_mel_spectrogram(pad_or_trim(audio, N_SAMPLES), model.dims.n_mels, device=model.device)
    features = model.encode(mel[None].to(model.dtype))
    language, tokens = text_tokens(model, features, options)
    tokenizer = model_tokenizer(model, language, "transcribe")
    positions = n_positions(len(audio))
    words, rows = spoken_words(model, tokenizer, tokens, features, positions)
    if not words:
        raise AudioError(f"{title}: no word is heard in it; choose another stretch with start, or give its text")
    trace = trace_text(model, tokenizer, tokens, features)
    layers = chosen_layers(model, options.layers)
    return View(
        title=title,
        text=tokenizer.decode(tokens).strip(),
        language=language,
        seconds=len(audio) / SAMPLE_RATE,
        spectrogram=mel[:, : 2 * positions].cpu(),
        words=words,
        primary=attention_map(trace.primary, layers, rows, positions),
        secondary=attention_map(trace.secondary, layers, rows, positions) if model.dual else None,
        gate=by_word(torch.stack([trace.gate[i][0] for i in sorted(trace.gate)], dim=1), rows) if model.dual else None,
        noise=noise,
    )


def text_tokens(model: Whisper, features: AudioFeatures, options: VisualizeOptions) -> tuple[str, list[int]]:
    """The language and the text tokens: those heard greedily, or those of the text that is given."""
    if options.text is None:
        wanted = DecodingOptions(language=options.language, without_timestamps=True)
        [heard] = decode_windows(model, features, wanted)
        return heard.language, heard.tokens
    language = language_code(options.language or "en")
    if options.language is None and model.is_multilingual:
        language = decode_windows(model, features, DecodingOptions(task="lang_id"))[0].language
    tokens = model_tokenizer(model, language, "transcribe").encode(" " + options.text.strip())
    return language, tokens[: model.dims.n_text_ctx // 2]


def spoken_words(
    model: Whisper, tokenizer: Tokenizer, tokens: list[int], features: AudioFeatures, positions: int
) -> tuple[list[Word], list[slice]]:
    """Words with their times, and which text tokens make up each of them."""
    timings = find_alignment(model, tokenizer, tokens, features, 2 * positions)
    defaults = TranscribeOptions()
    merge_punctuations(timings, defaults.prepend_punctuations, defaults.append_punctuations)
    words, rows, begin = [], [], 0
    for timing in timings:
        end = begin + len(timing.tokens)
        if timing.word.strip():
            words.append(Word(timing.word.strip(), timing.start, timing.end, timing.probability))
            rows.append(slice(begin, end))
        begin = end
    return words, rows


def trace_text(model: Whisper, tokenizer: Tokenizer, tokens: list[int], features: AudioFeatures) -> Trace:
    """Force the text through the decoder; the trace keeps the positions that predict a text token, and no others."""
    start = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
    trace = Trace(attention=True)
    model.decoder(torch.tensor([start + tokens[:-1]], device=model.device), features, trace=trace)
    first = len(start) - 1
    for scores in (trace.primary, trace.secondary):
        scores.update({layer: s[:, :, first:] for layer, s in scores.items()})
    trace.gate.update({layer: gate[:, first:] for layer, gate in trace.gate.items()})
    return trace


def chosen_layers(model: Whisper, layers: Sequence[int] | None) -> list[int]:
    n_layer = model.dims.n_text_layer
    if layers is None:
        return list(range(n_layer // 2, n_layer))
    for layer in layers:
        if not 0 <= layer < n_layer:
            raise OptionError(f"there is no decoder layer {layer}; this model has layers 0 to {n_layer - 1}")
    return list(layers)


def attention_map(scores: dict[int, Tensor], layers: list[int], rows: list[slice], positions: int) -> Tensor:
    """Scores [1, h, n, T] by layer -> attention within the audio by word [W, positions]."""
    maps = [scores[layer][0, :, :, :positions].float().softmax(dim=-1).mean(dim=0) for layer in layers]
    return by_word(torch.stack(maps).mean(dim=0), rows)


def by_word(x: Tensor, rows: list[slice]) -> Tensor:
    """Mean over each word's tokens: [n, ...] -> [W, ...] on the CPU, float32."""
    return torch.stack([x[row].float().mean(dim=0) for row in rows]).cpu()


# ---- explaining ---------------------------------------------------------------------------------------------------


def changed_words(view: View, other: View) -> set[int]:
    """Which words of a view the other one has not, or not at this place; case and punctuation aside."""
    heard, before = ([re.sub(r"\W", "", w.word).lower() for w in v.words] for v in (view, other))
    same = SequenceMatcher(None, before, heard, autojunk=False).get_matching_blocks()
    return set(range(len(heard))) - {i for block in same for i in range(block.b, block.b + block.size)}


def changes(views: Sequence[View]) -> list[set[int]]:
    """For each view the words that are heard otherwise than in the first."""
    return [changed_words(view, views[0]) for view in views]


def how_to_read(views: Sequence[View]) -> list[str]:
    """What a newcomer has to know to read the picture, a sentence or two each."""
    told = ["Spectrogram: the sound, time to the right, pitch upwards; the brighter, the louder."]
    first = views[0]
    if first.secondary is not None and first.gate is not None:
        told.append(
            "Gate: how the two branches are mixed for each word and decoder layer; 1 is the primary branch alone."
        )
        if torch.allclose(first.primary, first.secondary, atol=1e-4) and float(first.gate.std()) < 1e-4:
            told.append(
                "This model's second branch is untrained: a copy of the primary one, with the same gate everywhere."
            )
    told.append(
        "Attention: each row is a word, dark where the model listens to write it; the line under it shows when it was "
        "spoken. A stripe through all rows is a moment that every word listens to, often a pause."
    )
    if any(changes(views)):
        told.append("Words in red are heard otherwise than without the noise.")
    return told


# ---- files --------------------------------------------------------------------------------------------------------


def write_views(views: Sequence[View], model: str, stem: Path, output_format: str = "all") -> list[Path]:
    """STEM.json, .html and .png, or one of them. Without matplotlib "all" leaves out the PNG; OptionError if asked."""
    formats = PICTURE_FORMATS if output_format == "all" else (output_format,)
    data = json.dumps(view_values(views, model), ensure_ascii=False, separators=(",", ":"))
    written = []
    for name in formats:
        path = stem.with_name(f"{stem.name}.{name}")
        if name == "json":
            path.write_text(data + "\n", encoding="utf-8")
        elif name == "html":
            path.write_text(as_html(data), encoding="utf-8")
        else:
            try:
                figure = draw_gates(views) if name == GATE_ALONE else draw_views(views, model)
            except ModuleNotFoundError as e:
                if output_format != "all":
                    raise OptionError(f"{name} needs {e.name}: pip install 'dawhisper[plot]'") from e
                continue
            figure.savefig(path, dpi=110)
        written.append(path)
    return written


def view_values(views: Sequence[View], model: str) -> dict[str, Any]:
    """All that the pictures show; see `View`. Times are in seconds, spectrogram[0] is the lowest band."""
    return {
        "format": JSON_VERSION,
        "model": model,
        "frame_seconds": 1 / FRAMES_PER_SECOND,
        "position_seconds": 1 / TOKENS_PER_SECOND,
        "how_to_read": how_to_read(views),
        "views": [_view(view, changed) for view, changed in zip(views, changes(views))],
    }


def _view(view: View, changed: set[int]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "title": view.title,
        "text": view.text,
        "language": view.language,
        "seconds": round(view.seconds, 3),
        "words": [
            {
                "word": w.word,
                "start": round(w.start, 3),
                "end": round(w.end, 3),
                "probability": round(w.probability, 4),
                "changed": i in changed,  # heard otherwise than in the first view
            }
            for i, w in enumerate(view.words)
        ],
        "spectrogram": _rounded(view.spectrogram, 2),
        "primary": _rounded(view.primary, 5),
        "secondary": None if view.secondary is None else _rounded(view.secondary, 5),
        "gate": None if view.gate is None else _rounded(view.gate, 4),
        "noise": None if view.noise is None else _rounded(view.noise, 3),
    }
    if view.noise is not None:
        made["attention_on_noise"] = {"positions": round(float((view.noise > 0.5).float().mean()), 4)}
        for name in ("primary", "secondary"):
            if (attention := getattr(view, name)) is not None:
                made["attention_on_noise"][name] = round(view.on_noise(attention), 4)
    return made


def _rounded(x: Tensor, digits: int) -> list[Any]:
    return np.round(x.double().numpy(), digits).tolist()


def as_html(data: str) -> str:
    """One page with the data in it; it loads nothing from anywhere."""
    page = files(__package__).joinpath("visualize.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", data.replace("<", "\\u003c"))


# ---- the picture --------------------------------------------------------------------------------------------------

PRIMARY, SECOND, CHANGED = "#1f5fa8", "#d1590f", "#c8102e"  # the branches have their colours in every panel
NOISE = "#3c3c3c"


def draw_views(views: Sequence[View], model: str) -> Any:
    """A matplotlib Figure, a column for each view. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    dual = views[0].gate is not None
    words = max(len(v.words) for v in views)
    width = min(22.0, max(9.0, 0.35 * words + 3))  # inches, of a column
    attention = max(4.0, 0.15 * words)
    heights = [2.5, 2.0, attention, attention] if dual else [2.5, attention]
    figure = Figure(figsize=(width * len(views), sum(heights) + 3.5), layout="constrained")
    figure.suptitle(f"What {model} hears, and where it listens", fontsize=15, fontweight="bold")
    lines = [line for told in how_to_read(views) for line in textwrap.wrap(told, round(12 * width * len(views)))]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(len(heights), len(views), squeeze=False, height_ratios=heights)
    strip = any(v.noise is not None for v in views)
    for column, view, changed in zip(panels.T, views, changes(views)):
        _draw_spectrogram(view, column[0], strip, round(9 * width))
        _draw_branches(view, column[1:], figure)
        for axes in column:
            axes.set_xlim(0, view.seconds)
            for word in view.words:
                axes.axvline(word.start, color="#888888", linewidth=0.5, alpha=0.5)
        column[-1].set_xlabel("seconds")
        _mark(changed, column, view)
    return figure


def _draw_branches(view: View, panels: Sequence[Any], figure: Any) -> None:
    """The gate, and where each branch listens; for a single-branch model its one map."""
    from matplotlib.colors import LinearSegmentedColormap

    blues, oranges = (
        LinearSegmentedColormap.from_list(name, ["white", colour, dark])
        for name, colour, dark in (("primary", PRIMARY, "#0b2545"), ("second", SECOND, "#4a1c02"))
    )
    if view.secondary is None or view.gate is None:
        _draw_attention(view, view.primary, panels[0], "Where the cross-attention listens", blues)
        return
    _draw_scale(figure, _draw_gate(view, view.gate, panels[0]), panels[0])
    _draw_attention(view, view.primary, panels[1], "Where the primary branch listens", blues)
    _draw_attention(view, view.secondary, panels[2], "Where the second branch listens", oranges)


def _mark(changed: set[int], panels: Sequence[Any], view: View) -> None:
    """Colour the names of changed words, above the spectrogram and beside the maps."""
    above = panels[0].child_axes[0].get_xticklabels()
    beside = [axes.get_yticklabels() for axes in panels[1 if view.secondary is None else 2 :]]
    for labels in (above, *beside):
        for i in changed:
            labels[i].set_color(CHANGED)


def _draw_spectrogram(view: View, axes: Any, strip: bool, columns: int) -> None:
    """The spectrogram under its words and text, lines of up to `columns` characters.

    strip: leave room below it for where the noise truly was.
    """
    bands = len(view.spectrogram)
    extent = (0, view.spectrogram.shape[1] / FRAMES_PER_SECOND, 0, bands)
    axes.imshow(view.spectrogram.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma")
    lines = textwrap.wrap(f"heard ({view.language}): “{view.text}”", columns)
    lines = lines if len(lines) <= 3 else [*lines[:2], lines[2] + " …"]
    axes.set_title("\n".join([view.title, *lines]), loc="left", fontsize=11, pad=8)
    _write_words(view, axes)
    ticks = {0: "low pitch", bands: "high pitch"}
    if strip:
        axes.set_ylim(-0.15 * bands, bands)
        louder = view.noise > 0.5 if view.noise is not None else torch.zeros(1, dtype=torch.bool)
        for position in louder.nonzero().flatten().tolist():
            start = position / TOKENS_PER_SECOND
            axes.axvspan(start, start + 1 / TOKENS_PER_SECOND, 0.02, 0.1, color=NOISE, linewidth=0)
        ticks[-round(0.1 * bands)] = "noise is louder\nthan speech" if view.noise is not None else "no noise"
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)


def _draw_attention(view: View, attention: Tensor, axes: Any, title: str, colours: Any) -> None:
    """Each row to its own largest value, so that faint words are seen as well."""
    shown = attention / attention.amax(dim=1, keepdim=True)
    extent = (0, attention.shape[1] / TOKENS_PER_SECOND, len(attention), 0)
    axes.imshow(shown.numpy(), aspect="auto", extent=extent, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    for row, word in enumerate(view.words):  # where the word was spoken
        axes.plot([word.start, word.end], [row + 1, row + 1], color="black", linewidth=1.2, solid_capstyle="butt")
    axes.set_yticks(np.arange(len(view.words)) + 0.5, [w.word for w in view.words], fontsize=8)
    axes.set_ylabel("word being written")
    if view.noise is not None:
        shares = 100 * view.on_noise(attention), 100 * float((view.noise > 0.5).float().mean())
        title += "\n{:.0f}% of it where noise is louder than speech, which is {:.0f}% of the time".format(*shares)
    axes.set_title(title, loc="left", fontsize=10)


def _write_words(view: View, axes: Any) -> None:
    """The words above a panel, each at the middle of its time."""
    words = axes.secondary_xaxis("top")
    words.set_xticks([(w.start + w.end) / 2 for w in view.words], [w.word for w in view.words])
    words.tick_params(rotation=55, labelsize=9, length=2)
    for label in words.get_xticklabels():
        label.set(ha="left", rotation_mode="anchor")


def _draw_gate(view: View, gate: Tensor, axes: Any) -> Any:
    """A rectangle for each word and layer, as wide as the word is long."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("gate", [SECOND, "#f4f1ea", PRIMARY])
    layers = gate.shape[1]
    for column, word in zip(gate, view.words):
        extent = (word.start, max(word.end, word.start + 0.02), -0.5, layers - 0.5)
        image = axes.imshow(
            column[:, None].numpy(), origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=0, vmax=1
        )
    axes.set(ylim=(-0.5, layers - 0.5), ylabel="decoder layer", facecolor="#dddddd")
    axes.set_yticks(range(0, layers, max(1, layers // 6)))
    axes.set_title(
        f"Gate: which branch each word is read with, by layer (mean {float(gate.mean()):.2f}; grey: no word)",
        loc="left",
        fontsize=10,
    )
    return image


def _draw_scale(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=60, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0: second branch alone", "0.5: both alike", "1: primary branch alone"])


def draw_gates(views: Sequence[View]) -> Any:
    """A matplotlib Figure of the words and the gate alone, a row for each view. OptionError for a single branch."""
    from matplotlib.figure import Figure

    if any(view.gate is None for view in views):
        raise OptionError("this model has one branch, so no gate; give one with two, as dawhisper-base is")
    words = max(len(v.words) for v in views)
    figure = Figure(figsize=(min(16.0, max(7.0, 0.4 * words)), 2.2 * len(views) + 0.4), layout="constrained")
    panels = figure.subplots(len(views), 1, squeeze=False)[:, 0]
    for view, changed, axes in zip(views, changes(views), panels):
        assert view.gate is not None
        image = _draw_gate(view, view.gate, axes)
        _write_words(view, axes)
        axes.set_title(f"{view.title}: gate {float(view.gate.mean()):.2f} on average", loc="left", fontsize=11, pad=8)
        axes.set_xlim(0, view.seconds)
        _mark(changed, [axes], view)
    _draw_scale(figure, image, panels[-1])
    return figure
