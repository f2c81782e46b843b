"""The model in training: from spectrograms and tokens to the losses of one micro-batch, each apart.

`Student` holds the model and whatever exists only in training (the noise-mel head). Its forward pass is the whole
objective, so that DistributedDataParallel and torch.compile see one module. The frozen teacher is no part of it: it
is asked first, and what it says goes in as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dawhisper.model import AudioFeatures, Whisper, layer_norm
from dawhisper.trace import Trace

from . import losses
from .inputs import Hypotheses, Inputs
from .option_types import Scale, Several, Share


@dataclass(frozen=True)
class ObjectiveOptions:
    """Weights of the objectives, see losses.py; 0 leaves one out.

    cross_entropy: transcripts, or the teacher's text; silence: noise-only windows get Whisper's no-speech target;
    logits, encoder, attention: label-free distillation from the teacher (encoder: the secondary's memory learns it
    where it has layers of its own, else the encoder output); layers: the same at the encoder layers below, each
    brought to one scale (hints, FitNets, arXiv:1412.6550); gate: supervision by the mixture's SNR;
    primary: the primary's encoder output learns the teacher's too, where there is no noise: cut to the length of the
    audio it must give what Whisper gives of 30 s; hold_primary, hold_secondary: share of the windows without and with
    noise that are heard through that branch alone, so that each can stand for itself.
    risk: expected word errors of the student's own hypotheses, see risk.py: risk_samples of each window, drawn at
    risk_temperature; risk_timestamps is the share of the batches in which they are drawn with time stamps.
    noise_attention, noise_mel: what the secondary branch should know of the noise (`noise_layers`: which decoder
    layers attend to it, None = all).
    """

    cross_entropy: float = 0.0
    label_smoothing: float = 0.0
    silence: float = 0.1
    logits: float = 1.0
    temperature: Scale = 1.0
    encoder: float = 1.0
    layers: float = 0.0
    attention: float = 1.0
    gate: float = 0.1
    gate_centre_db: float = 7.5
    gate_width_db: Scale = 5.0
    primary: float = 0.0
    hold_primary: Share = 0.0
    hold_secondary: Share = 0.0
    risk: float = 0.0
    risk_samples: Annotated[int, Field(ge=2)] = 4
    risk_temperature: Scale = 0.6
    risk_timestamps: Share = 0.0
    noise_attention: float = 0.0
    noise_layers: Several[int] | None = None
    noise_mel: float = 0.0


class Lesson(NamedTuple):
    """What the teacher makes of the clean audio; a part is None where no objective asks for it."""

    logits: Tensor | None  # [B, n, V]
    encoder: Tensor | None  # [B, T, d]
    layers: tuple[Tensor, ...] | None  # [B, T, d] by encoder layer, without the last
    attention: tuple[Tensor, ...] | None  # [B, n, d] for each of the student's layers: cross-attention output


class Heard(NamedTuple):
    """What a student's forward pass gives to its objectives."""

    logits: Tensor  # [B, n, V]
    primary: Tensor  # [B, T, d]
    secondary: Tensor  # [B, T, d]
    attention: tuple[Tensor, ...]  # [B, n, d] by layer: fused cross-attention output
    gate: tuple[Tensor, ...]  # [B, n] by layer
    scores: tuple[Tensor, ...]  # [B, h, n, T] by layer: the secondary's attention before the softmax
    layers: tuple[Tensor, ...]  # [B, T, d] by encoder layer, of those that the secondary's memory comes from
    said: Tensor | None = None  # [B * N, n, V] logits of the student's own hypotheses


class Teacher(nn.Module):
    """A frozen model that hears the clean audio. `layers`: whom of its layers each layer of the student learns from."""

    def __init__(self, model: Whisper, options: ObjectiveOptions, layers: Sequence[int]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.options, self.layers = options, tuple(layers)

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> Lesson:
        if inputs.clean_mel is None:
            raise ValueError("the teacher needs the clean audio: inputs.clean_mel")
        o, n_frames = self.options, inputs.frames.shape[1]
        trace = Trace() if o.attention else None
        layers: list[Tensor] = []
        features = self.model.encoder(inputs.clean_mel, layers if o.layers else None)
        logits = None
        if o.logits or o.attention:
            logits = self.model.decoder(inputs.tokens, features, trace=trace, dtype=None)
        return Lesson(
            logits if o.logits else None,
            features.primary[:, :n_frames] if o.encoder else None,
            tuple(x[:, :n_frames] for x in layers[:-1]) if o.layers else None,
            None if trace is None else tuple(trace.output[layer] for layer in self.layers),
        )


class Student(nn.Module):
    """A Whisper and its objectives."""

    def __init__(self, model: Whisper, options: ObjectiveOptions):
        super().__init__()
        self.model = model
        self.options = options
        self.noise_head: nn.Linear | None = None
        if options.noise_mel:
            self.noise_head = nn.Linear(model.dims.n_audio_state, model.dims.n_mels)

    def forward(
        self, inputs: Inputs, lesson: Lesson | None, counts: Tensor, hypotheses: Hypotheses | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and its parts unweighted and detached, with the gate's sums on clean and noisy windows.

        counts [5]: what `count` gives, summed over the step's micro-batches and devices, over the number of devices.
        """
        return self.score(self.hear(inputs, hypotheses), inputs, lesson, counts, hypotheses)

    def hear(self, inputs: Inputs, hypotheses: Hypotheses | None = None) -> Heard:
        o, model = self.options, self.model
        wanted = model.dual is not None or o.attention
        trace = Trace(attention=bool(o.noise_attention)) if wanted else None
        layers: list[Tensor] = []
        features: AudioFeatures = model.encoder(inputs.mel, layers if o.layers else None)
        logits = model.decoder(inputs.tokens, features, trace=trace, dtype=None, held=inputs.held)
        said = None if hypotheses is None else model.decoder(hypotheses.tokens, features, dtype=None)
        if trace is None:
            return Heard(logits, *features, (), (), (), tuple(layers), said)
        attention, gate, scores = (tuple(part.values()) for part in (trace.output, trace.gate, trace.secondary))
        return Heard(logits, *features, attention, gate, scores, tuple(layers), said)

    def score(
        self,
        heard: Heard,
        inputs: Inputs,
        lesson: Lesson | None,
        counts: Tensor,
        hypotheses: Hypotheses | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o, labels, snr_db = self.options, inputs.labels, inputs.snr_db
        n_speech, n_silence, n_target, n_frame, n_noisy = counts.unbind()
        silent = (snr_db == -torch.inf)[:, None]
        target = labels != losses.IGNORE
        speech = target & ~silent  # what the teacher says of silence is no lesson
        parts: dict[str, Tensor] = {}
        if o.cross_entropy:
            spoken = labels.masked_fill(silent, losses.IGNORE)
            parts["cross_entropy"] = losses.cross_entropy(heard.logits, spoken, o.label_smoothing, n_speech)
        if o.silence:
            unspoken = labels.masked_fill(~silent, losses.IGNORE)
            parts["silence"] = losses.cross_entropy(heard.logits, unspoken, count=n_silence)
        if lesson is not None and lesson.logits is not None:
            parts["logits"] = losses.distil_logits(heard.logits, lesson.logits, speech, o.temperature, n_speech)
        if lesson is not None and lesson.encoder is not None:
            memory = heard.secondary if self.model.encoder.secondary_blocks else heard.primary
            parts["encoder"] = losses.distil_features(memory, lesson.encoder, inputs.frames, n_frame)
            if o.primary:
                quiet = inputs.frames & (snr_db == torch.inf)[:, None]  # in noise the primary may hear what it hears
                parts["primary"] = losses.distil_features(heard.primary, lesson.encoder, quiet, n_frame)
        if lesson is not None and lesson.layers is not None:
            each = [
                losses.distil_features(layer_norm(mine), layer_norm(taught), inputs.frames, n_frame)
                for mine, taught in zip(heard.layers[-2::-1], lesson.layers[::-1])  # from the top down
            ]
            parts["layers"] = torch.stack(each).mean()
        if lesson is not None and lesson.attention is not None:
            each = [
                losses.distil_features(mine, taught, speech, n_speech)
                for mine, taught in zip(heard.attention, lesson.attention)
            ]
            parts["attention"] = torch.stack(each).mean()
        gate = torch.stack(heard.gate).float() if heard.gate else None  # [L, B, n]
        if gate is not None and o.gate:
            shape = (o.gate_centre_db, o.gate_width_db)
            parts["gate"] = losses.gate_supervision(gate, snr_db, target, *shape, count=n_target)
        if o.noise_attention and inputs.dominance is not None:
            dominance = inputs.dominance * inputs.frames
            chosen = range(len(heard.scores)) if o.noise_layers is None else o.noise_layers
            each = [losses.noise_attention(heard.scores[layer], dominance, target, n_noisy) for layer in chosen]
            parts["noise_attention"] = torch.stack(each).mean()
        if self.noise_head is not None and inputs.noise_mel is not None:
            predicted = self.noise_head(heard.secondary)
            parts["noise_mel"] = losses.noise_mel(predicted, inputs.noise_mel, inputs.frames, n_frame)

        if heard.said is not None and hypotheses is not None:
            drawn = (as_drawn(heard.said, hypotheses), hypotheses.labels, hypotheses.advantage, o.risk_temperature)
            parts["risk"] = losses.risk(*drawn, count=o.risk_samples * n_speech)

        total = torch.stack([getattr(o, name) * value for name, value in parts.items()]).sum()
        report = {name: value.detach() for name, value in parts.items()}
        if hypotheses is not None:
            report["sampled_errors"] = hypotheses.errors
        if gate is not None:
            report |= mean_gate(gate.detach(), snr_db, target)
        return total, report


@torch.no_grad()
def as_drawn(logits: Tensor, hypotheses: Hypotheses) -> Tensor:
    """The logits [R, n, V] of hypotheses with what the rules forbade at -inf, in place.

    What the rules force is no choice. A forced time stamp that is blamed for errors would become unlikelier with every
    step and be drawn all the same, without end.
    """
    tokens, begin = hypotheses.tokens, hypotheses.begin
    said = hypotheses.labels.clamp(min=0)[..., None]
    kept = logits.gather(-1, said)  # rounding may move a rule's threshold: what was drawn was allowed
    for place in range(begin - 1, tokens.shape[1]):
        hypotheses.rules.apply(logits[:, place], tokens[:, begin : place + 1])
    return logits.scatter_(-1, said, kept)


def mean_gate(gate: Tensor, snr_db: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The gate [L, B, n] summed over clean and over noisy windows, and how many positions that is.

    The log takes names without a slash for parts of the loss.
    """
    level = gate.float().mean(0)  # [B, n]
    clean = (snr_db == torch.inf)[:, None] & target
    noisy = (snr_db != torch.inf)[:, None] & target
    return {
        "gate/clean_sum": (level * clean).sum(),
        "gate/clean_count": clean.sum().float(),
        "gate/noisy_sum": (level * noisy).sum(),
        "gate/noisy_count": noisy.sum().float(),
    }
