"""The recognisers of an evaluation: our own models, and other packages' for comparison.

A model is named `NAME`, `PATH`, `openai:NAME_OR_PATH`, `faster:NAME_OR_PATH`, `hf:FOLDER` or `cpp:FILE`; with a
label of one's own before it where wanted: `mine=runs/dual/model.safetensors`. All get the same 16 kHz samples. What is
not ours is imported only when it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dawhisper.audio import N_SAMPLES, pad_or_trim
from dawhisper.checkpoint import OWN_MODEL, available_models, load_model
from dawhisper.decoding import DecodingOptions
from dawhisper.errors import CheckpointError, OptionError, near_names, one_line
from dawhisper.formats.huggingface import hide_broken_torchaudio
from dawhisper.front_end import FrontEnd, hearings, shares_of, through
from dawhisper.transcribe import transcribe
from dawhisper.window import decode_clips

PACKAGES = {  # of each back end: what is imported, what is installed
    "openai": ("whisper", "openai-whisper"),
    "faster": ("faster_whisper", "faster-whisper"),
    "hf": ("transformers", "transformers"),
    "cpp": ("pywhispercpp", "pywhispercpp"),
}
EVALUATED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """A model to evaluate: its label in the results, back end ("" is ours), and name or path.

    front_end: how it hears recordings.
    """

    label: str
    backend: str
    path: str
    front_end: FrontEnd = field(default_factory=FrontEnd)

    @property
    def spec(self) -> str:
        return f"{self.backend}:{self.path}" if self.backend else self.path

    def fingerprint(self) -> str:
        """Changes when the weights behind a path do, so that old hypotheses are not taken for a new model's."""
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else []
        digest = hashlib.blake2b(self.spec.encode(), digest_size=8) if not files else hashlib.blake2b(digest_size=8)
        digest.update(self.backend.encode())
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Decoding:
    """How all models decode: greedily, with beams, or as `transcribe` does with its temperature fallback.

    rerank: of DecodingOptions, for our own models alone.
    """

    beam_size: int | None = None
    fallback: bool = False
    dtype: str = "fp32"
    rerank: str | None = None


class Recognizer(Protocol):
    """Transcribes recordings, float32 [n] each, in one language (None: detect it) -> their texts."""

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]: ...


def parse_models(names: Sequence[str]) -> list[ModelSpec]:
    """`LABEL=BACKEND:PATH` of each, with a label made up where there is none. OptionError for what can't be meant."""
    if not names:
        raise OptionError("no model to evaluate: give --model NAME_OR_PATH, once or more")
    parsed = [_parse(name) for name in names]
    labels = [p.label for p in parsed]
    specs = [p if labels.count(p.label) == 1 else ModelSpec(p.spec, p.backend, p.path) for p in parsed]
    for i, spec in enumerate(specs):
        if spec.label in [other.label for other in specs[:i]]:
            raise OptionError(f"two models are called {spec.label}: label one of them, as in --model NAME={spec.spec}")
    return specs


def _parse(name: str) -> ModelSpec:
    label, equals, rest = name.partition("=")
    if not equals or os.path.exists(name) or set(label) & {"/", "\\", ":"}:  # noqa: PTH110 - any text may come here
        label, rest = "", name
    backend, colon, path = rest.partition(":")
    if not colon or os.path.exists(rest) or len(backend) < 2:  # noqa: PTH110
        backend, path = "", rest
    elif backend not in PACKAGES:
        raise OptionError(
            f"--model {name}: unknown back end {backend!r}; known: {', '.join(PACKAGES)}{near_names(backend, PACKAGES)}"
        )
    if not path:
        raise OptionError(f"--model {name!r} names no model: give a name or a path")
    if not label:
        stem = Path(path).stem if path.endswith((".pt", ".safetensors")) else Path(path).name
        label = f"{backend}:{stem}" if backend else stem
    return ModelSpec(label, backend, path)


def behind(specs: Sequence[ModelSpec], front_end: FrontEnd) -> list[ModelSpec]:
    """The same models, each behind an enhancer."""
    return [replace(one, label=f"{one.label}+{front_end.enhancer}", front_end=front_end) for one in specs]


def check_models(specs: Sequence[ModelSpec], dtype: str | None = None, rerank: str | None = None) -> None:
    """Raise for a model that can't be loaded or decoded so, before hours are spent on those that stand before it."""
    for spec in specs:
        if spec.backend and (len(shares_of(spec.front_end.mix)) > 1 or spec.front_end.choose):
            raise OptionError(
                f"--model {spec.spec}: {PACKAGES[spec.backend][1]} hears once; give one share as --front_end_mix, and "
                "leave out --front_end_choose"
            )
        if spec.backend and rerank:
            raise OptionError(
                f"--model {spec.spec}: {PACKAGES[spec.backend][1]} has no --rerank; give --model {spec.path}"
            )
        if spec.backend == "openai" and dtype == "bf16":
            raise OptionError(f"--model {spec.spec}: openai-whisper has no bf16; give --dtype fp16 or fp32")
        if spec.backend in ("openai", "hf") and dtype == "int8":
            raise OptionError(f"--model {spec.spec}: {PACKAGES[spec.backend][1]} has no int8; give --dtype fp32")
        if spec.backend:
            module, package = PACKAGES[spec.backend]
            if spec.path == OWN_MODEL or spec.path.endswith(".safetensors"):
                raise OptionError(f"--model {spec.spec}: {package} can't load {spec.path}; give --model {spec.path}")
            if importlib.util.find_spec(module) is None:
                raise OptionError(f"--model {spec.spec} needs {package}, which is not installed: pip install {package}")
        if spec.backend in ("", "openai") and spec.path not in available_models() and not Path(spec.path).exists():
            load_model(spec.path)  # raises: it knows what is near
        if spec.backend == "hf" and not Path(spec.path).is_dir():
            raise CheckpointError(f"no such folder: {spec.path}; --model hf: takes a folder in transformers' format")
        if spec.backend == "cpp" and not Path(spec.path).is_file():
            raise CheckpointError(
                f"no such file: {spec.path}; --model cpp: takes what whisper.cpp's models/convert-pt-to-ggml.py makes"
            )


def load_recognizer(spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int) -> Recognizer:
    """The recogniser of a spec; raises a DawhisperError when the model can't be loaded."""
    if not spec.backend:
        return Ours(spec, decoding, device, seed)
    if spec.front_end.enhancer:
        bare = load_recognizer(replace(spec, front_end=FrontEnd()), decoding, device, seed)
        return Cleaned(bare, spec.front_end, device)
    kinds: dict[str, Any] = {"openai": OpenAI, "faster": Faster, "hf": HuggingFace, "cpp": WhisperCpp}
    try:
        return kinds[spec.backend](spec, decoding, device, seed)
    except (OSError, RuntimeError, ValueError) as e:
        reason = one_line(e).split(". ")[0]
        raise CheckpointError(f"{spec.spec} can't be loaded ({reason})") from e


class Cleaned:
    """Another package's recogniser behind an enhancer."""

    def __init__(self, recognize: Recognizer, front_end: FrontEnd, device: torch.device):
        self.recognize, self.front_end, self.device = recognize, front_end, device

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        return self.recognize(through(audio, self.front_end, self.device), language)


class Ours:
    """A model of `dawhisper.load_model`: OpenAI's and Hugging Face's checkpoints, and dawhisper files."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int):
        self.model = load_model(spec.path, device=device, dtype=decoding.dtype)
        self.front_end, self.decoding, self.seed = spec.front_end, decoding, seed
        self.searched: dict[str, Any] = {"beam_size": decoding.beam_size, "rerank": decoding.rerank}

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        if self.decoding.fallback or max(map(len, audio)) > N_SAMPLES:
            return [self._transcribe(x, language) for x in audio]
        torch.manual_seed(self.seed)  # reranking samples; a batch must not hear of those before it
        options = DecodingOptions(language=language, without_timestamps=True, **self.searched)
        heard, hearing_of = hearings(audio, self.front_end, self.model.device)
        return [result.text for result in decode_clips(self.model, heard, options, hearing_of)]

    def _transcribe(self, audio: np.ndarray, language: str | None) -> str:
        torch.manual_seed(self.seed)  # the fallback samples; an utterance must not hear of those before it
        options: dict[str, Any] = {} if self.decoding.fallback else {"temperature": 0.0}
        heard = self.front_end
        options |= {"front_end": heard.enhancer, "front_end_mix": heard.mix}
        options |= {"front_end_snr": heard.snr, "front_end_choose": heard.choose}
        result = transcribe(self.model, audio, language=language, **self.searched, **options)
        return result.text.strip()  # type: ignore[union-attr]  # one recording, one result


class OpenAI:
    """openai-whisper itself."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int):
        import whisper

        self.model = whisper.load_model(spec.path, device=device)
        self.fp16 = decoding.dtype == "fp16"
        self.decoding, self.seed = decoding, seed

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        import whisper

        language = language if self.model.is_multilingual else "en"  # it would try to detect it
        beams = self.decoding.beam_size
        if self.decoding.fallback or max(map(len, audio)) > N_SAMPLES:
            return [self._transcribe(x, language) for x in audio]
        n_mels = self.model.dims.n_mels
        mels = [whisper.log_mel_spectrogram(pad_or_trim(x), n_mels, device=self.model.device) for x in audio]
        options = whisper.DecodingOptions(language=language, without_timestamps=True, beam_size=beams, fp16=self.fp16)
        return [r.text for r in whisper.decode(self.model, torch.stack(mels), options)]

    def _transcribe(self, audio: np.ndarray, language: str | None) -> str:
        torch.manual_seed(self.seed)
        options: dict[str, Any] = {} if self.decoding.fallback else {"temperature": 0.0}
        beams = self.decoding.beam_size
        result = self.model.transcribe(audio, language=language, beam_size=beams, fp16=self.fp16, **options)
        return str(result["text"]).strip()


class Faster:
    """faster-whisper (CTranslate2), one recording at a time as it is commonly called, without voice detection."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int):
        from faster_whisper import WhisperModel

        kind = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(decoding.dtype, decoding.dtype)
        threads = torch.get_num_threads()
        self.model = WhisperModel(spec.path, device.type, device.index or 0, compute_type=kind, cpu_threads=threads)
        self.decoding = decoding

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        return [self._one(x, language) for x in audio]

    def _one(self, audio: np.ndarray, language: str | None) -> str:
        options: dict[str, Any] = {"beam_size": self.decoding.beam_size or 1}
        if not self.decoding.fallback:
            options["temperature"] = 0.0
            if len(audio) <= N_SAMPLES:  # a window's text as it comes; beyond, it moves on by the timestamps
                options |= {"without_timestamps": True, "no_speech_threshold": None}
        segments, _ = self.model.transcribe(audio, language=language, **options)
        return "".join(segment.text for segment in segments).strip()


class WhisperCpp:
    """whisper.cpp by pywhispercpp, one recording at a time on the CPU; it computes in what its file is stored in."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int):
        from pywhispercpp.model import Model

        quiet = {"print_progress": False, "print_realtime": False, "redirect_whispercpp_logs_to": None}
        strategy = int(bool(decoding.beam_size))  # 0 is greedy
        self.model = Model(spec.path, params_sampling_strategy=strategy, n_threads=torch.get_num_threads(), **quiet)
        self.options: dict[str, Any] = {"no_context": True}
        if decoding.beam_size:
            self.options["beam_search"] = {"beam_size": decoding.beam_size, "patience": -1.0}
        else:
            self.options["greedy"] = {"best_of": 1}
        if not decoding.fallback:
            self.options |= {"temperature": 0.0, "temperature_inc": 0.0}

    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        return [self._one(x, language) for x in audio]

    def _one(self, audio: np.ndarray, language: str | None) -> str:
        segments = self.model.transcribe(audio, language=language or "auto", **self.options)
        return " ".join(segment.text.strip() for segment in segments)


class HuggingFace:
    """A Whisper in the format of transformers."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, device: torch.device, seed: int):
        hide_broken_torchaudio()
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self.processor: Any = WhisperProcessor.from_pretrained(spec.path)
        model: Any = WhisperForConditionalGeneration.from_pretrained(spec.path, dtype=EVALUATED_DTYPES[decoding.dtype])
        self.model = model.to(device).eval()
        self.options: dict[str, Any] = {"num_beams": decoding.beam_size or 1, "do_sample": False}
        if decoding.fallback:
            temperatures = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
            self.options |= {"temperature": temperatures, "compression_ratio_threshold": 2.4, "logprob_threshold": -1.0}
            self.options |= {"no_speech_threshold": 0.6, "do_sample": True}
        self.seed = seed

    @torch.no_grad()
    def __call__(self, audio: Sequence[np.ndarray], language: str | None) -> list[str]:
        long = max(map(len, audio)) > N_SAMPLES
        padding = {"padding": "longest", "truncation": False} if long else {}
        inputs = self.processor(
            list(audio), sampling_rate=16000, return_tensors="pt", return_attention_mask=True, **padding
        ).to(self.model.device, self.model.dtype)
        options = self.options | {"return_timestamps": long}
        if self.model.generation_config.is_multilingual:
            options |= {"language": language, "task": "transcribe"}
        torch.manual_seed(self.seed)
        tokens = self.model.generate(inputs.input_features, attention_mask=inputs.attention_mask, **options)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
