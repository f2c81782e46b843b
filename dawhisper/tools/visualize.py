"""What a model heard, as one picture: the gate, the spectrogram, and both attention maps over one time axis.

`look` gives the numbers (view.py), `write_views` their files: JSON, a page that plays the sound and can be zoomed
(HTML, nothing is fetched), PNG, and a PNG of the gate alone (view_figures.py).
W words, T encoder positions of 20 ms, L decoder layers.
"""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND, N_SAMPLES, SAMPLE_RATE, TOKENS_PER_SECOND
from whisper.timing import merge_punctuations
from whisper.tokenizer import Tokenizer

from dawhisper.audio import load_audio, log_mel_spectrogram, pad_or_trim, to_int16
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL, load_model
from dawhisper.decoding import DecodingOptions, decode_windows, encode_text, language_code, model_tokenizer
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

from .view import View, changes, notes, pitches

PICTURE_FORMATS = ("html", "json", "png")
GATE_ALONE = "gate.png"  # a fourth format, written where it is asked for
JSON_VERSION = 2
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


def visualize(options: VisualizeOptions) -> list[Path]:
    """Look at the recording (or pair) and write the files; returns their paths. DawhisperError for bad input."""
    folder = Path(options.output_dir)
    writable_folder(folder)
    recordings = read_recordings(options)
    formats_of(options.output_format)  # what is missing is told before the model is loaded
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
        audio=audio,
    )


def text_tokens(model: Whisper, features: AudioFeatures, options: VisualizeOptions) -> tuple[str, list[int]]:
    """The language and the text tokens: those heard greedily, or those of the text that is given."""
    if options.text is None:
        wanted = DecodingOptions(language=options.language, without_timestamps=True)
        [heard] = decode_windows(model, features, wanted)
        eot = model_tokenizer(model, heard.language, "transcribe").eot
        return heard.language, [token for token in heard.tokens if token < eot]  # a time stamp is no text
    language = language_code(options.language or "en")
    if options.language is None and model.is_multilingual:
        language = decode_windows(model, features, DecodingOptions(task="lang_id"))[0].language
    tokens = encode_text(model_tokenizer(model, language, "transcribe"), options.text)
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


# ---- files --------------------------------------------------------------------------------------------------------


def write_views(views: Sequence[View], model: str, stem: Path, output_format: str = "all") -> list[Path]:
    """STEM.json, .html and .png, or one of them; see `formats_of`."""
    formats = formats_of(output_format)
    data = json.dumps(view_values(views, model), ensure_ascii=False, separators=(",", ":"))
    written = []
    for name in formats:
        path = stem.with_name(f"{stem.name}.{name}")
        if name == "json":
            path.write_text(data + "\n", encoding="utf-8")
        elif name == "html":
            path.write_text(as_html(data, views), encoding="utf-8")
        else:
            from .view_figures import draw_gates, draw_views

            figure = draw_gates(views) if name == GATE_ALONE else draw_views(views, model)
            figure.savefig(path, dpi=110)
        written.append(path)
    return written


def formats_of(output_format: str) -> tuple[str, ...]:
    """What is written. Without matplotlib "all" leaves out the PNG, and OptionError is raised where it is asked for."""
    if output_format in ("html", "json"):
        return (output_format,)
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as e:
        if output_format != "all":
            raise OptionError(f"{output_format} needs {e.name}: pip install 'dawhisper[plot]'") from e
        return ("html", "json")
    return PICTURE_FORMATS if output_format == "all" else (output_format,)


def view_values(views: Sequence[View], model: str) -> dict[str, Any]:
    """All that the pictures show; see `View`. Times are in seconds, spectrogram[0] is the lowest band."""
    return {
        "format": JSON_VERSION,
        "model": model,
        "frame_seconds": 1 / FRAMES_PER_SECOND,
        "position_seconds": 1 / TOKENS_PER_SECOND,
        "notes": notes(views),
        "pitches": pitches(len(views[0].spectrogram)),  # kHz and band
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


def as_html(data: str, views: Sequence[View]) -> str:
    """One page with the data and the sound in it; it loads nothing from anywhere."""
    page = files(__package__).joinpath("visualize.html").read_text(encoding="utf-8")
    sounds = json.dumps([None if view.audio is None else as_data_uri(view.audio) for view in views])
    return page.replace("/*DATA*/null", data.replace("<", "\\u003c")).replace("/*SOUNDS*/null", sounds)


def as_data_uri(audio: np.ndarray) -> str:
    """Samples [n] at 16 kHz as a WAV file that a page can hold."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(to_int16(audio).tobytes())
    return "data:audio/wav;base64," + base64.b64encode(out.getvalue()).decode()
