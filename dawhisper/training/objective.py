"""The model in training: from spectrograms and tokens to the losses of one micro-batch, each apart.

`Student` holds the model and whatever exists only in training (the noise-mel head). Its forward pass is the whole
objective, so that DistributedDataParallel and torch.compile see one module. The frozen teacher is no part of it: it
is asked first, and what it says goes in as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dawhisper.distributed import World
from dawhisper.errors import OptionError
from dawhisper.model import ModelDimensions, Trace, Whisper, is_second_branch

from . import losses
from .recipe import ModelOptions, ObjectiveOptions

COUNTS = ("speech", "silence", "target", "frame", "noisy")  # what the losses are divided by, see `count`


class Inputs(NamedTuple):
    """One micro-batch as the student takes it. S samples, n tokens, T encoder positions, all on one device."""

    mel: Tensor  # [B, n_mels, 2T] what the student hears
    tokens: Tensor  # [B, n] decoder input
    labels: Tensor  # [B, n] next tokens, losses.IGNORE where there is no loss
    snr_db: Tensor  # [B] +inf without noise, -inf for noise alone
    frames: Tensor  # [B, T] bool, encoder positions that hear audio
    clean_mel: Tensor | None = None  # [B, n_mels, 3000 or 2T] what the teacher hears
    noise_mel: Tensor | None = None  # [B, n_mels, 2T] the noise alone
    dominance: Tensor | None = None  # [B, T] the noise's share of the energy


class Lesson(NamedTuple):
    """What the teacher makes of the clean audio; a part is None where no objective asks for it."""

    logits: Tensor | None  # [B, n, V]
    encoder: Tensor | None  # [B, T, d]
    attention: tuple[Tensor, ...] | None  # [B, n, d] for each of the student's layers: cross-attention output


def count(inputs: Inputs) -> Tensor:
    """How many positions each kind of loss covers in this micro-batch: float [5], see COUNTS."""
    target = inputs.labels != losses.IGNORE
    silent = (inputs.snr_db == -torch.inf)[:, None]
    noisy = torch.isfinite(inputs.snr_db)[:, None] | silent
    masks = (target & ~silent, target & silent, target, inputs.frames, target & noisy)
    return torch.stack([mask.sum() for mask in masks]).float()


class Heard(NamedTuple):
    """What a student's forward pass gives to its objectives."""

    logits: Tensor  # [B, n, V]
    primary: Tensor  # [B, T, d]
    secondary: Tensor  # [B, T, d]
    attention: tuple[Tensor, ...]  # [B, n, d] by layer: fused cross-attention output
    gate: tuple[Tensor, ...]  # [B, n] by layer
    scores: tuple[Tensor, ...]  # [B, h, n, T] by layer: the secondary's attention before the softmax


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
        features = self.model.encode(inputs.clean_mel)
        logits = None
        if o.logits or o.attention:
            logits = self.model.decoder(inputs.tokens, features, trace=trace, dtype=None)
        return Lesson(
            logits if o.logits else None,
            features.primary[:, :n_frames] if o.encoder else None,
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

    def forward(self, inputs: Inputs, lesson: Lesson | None, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and its parts unweighted and detached, with the gate's sums on clean and noisy windows.

        counts [5]: what `count` gives, summed over the step's micro-batches and devices, over the number of devices.
        """
        return self.score(self.hear(inputs), inputs, lesson, counts)

    def hear(self, inputs: Inputs) -> Heard:
        o, model = self.options, self.model
        wanted = model.dual is not None or o.attention
        trace = Trace(attention=bool(o.noise_attention)) if wanted else None
        features = model.encode(inputs.mel)
        logits = model.decoder(inputs.tokens, features, trace=trace, dtype=None)
        if trace is None:
            return Heard(logits, *features, (), (), ())
        parts = (trace.output, trace.gate, trace.secondary)
        return Heard(logits, *features, *(tuple(part.values()) for part in parts))

    def score(
        self, heard: Heard, inputs: Inputs, lesson: Lesson | None, counts: Tensor
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

        total = torch.stack([getattr(o, name) * value for name, value in parts.items()]).sum()
        report = {name: value.detach() for name, value in parts.items()}
        if gate is not None:
            report |= mean_gate(gate.detach(), snr_db, target)
        return total, report


def parallelise(
    student: Student, teacher: Teacher | None, world: World, compile: str, fsdp: bool, graph: bool = False
) -> nn.Module:
    """What the loop calls in the student's place: compiled, and shared by the world's processes.

    compile "encoder": the encoders' blocks, which take most of the time; one stands for all, so it compiles in seconds;
    "blocks": the decoders' too, where they are not sharded; "model": the whole forward pass, anew for each length of
    audio and text.
    graph: replayed passes exchange no gradients, so the loop does.
    """
    torch._dynamo.config.recompile_limit = 64  # one for each length of audio and text
    if compile in ("encoder", "blocks"):
        for model in [student.model] if teacher is None else [student.model, teacher.model]:
            model.compile_blocks(decoder=compile == "blocks" and not fsdp)
    parallel: nn.Module = student
    if fsdp:
        parallel = shard(student, world)
    elif world.size > 1 and not graph:
        parallel = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    if compile == "model":
        parallel.compile(dynamic=False)
        if teacher is not None:
            teacher.compile(dynamic=False)
    return parallel


def attention_kernel(name: str) -> AbstractContextManager[Any]:
    """Which kernel scaled_dot_product_attention tries first: "default" leaves it to torch, or "cudnn", "flash"."""
    if name == "default":
        return nullcontext()
    first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel([first, *(kernel for kernel in others if kernel != first)], set_priority=True)


def shard(student: Student, world: World) -> nn.Module:
    """Fully sharded: each device holds a part of every block's weights, gradients and moments (FSDP2)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not torch.distributed.is_initialized():
        raise OptionError("loop.fsdp=true needs torchrun: torchrun --nproc_per_node N train.py ...")
    model = student.model
    for block in [*model.encoder.blocks, *model.encoder.secondary_blocks, *model.decoder.blocks]:
        fully_shard(block)
        if hasattr(block, "memory"):
            register_fsdp_forward_method(block, "memory")
    fully_shard(student)
    return student


def mean_gate(gate: Tensor, snr_db: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The gate [L, B, n] summed over clean and over noisy windows, and how many positions that is."""
    level = gate.float().mean(0)  # [B, n]
    clean = (snr_db == torch.inf)[:, None] & target
    noisy = (snr_db != torch.inf)[:, None] & target
    return {
        "gate_clean_sum": (level * clean).sum(),
        "gate_clean_count": clean.sum().float(),
        "gate_noisy_sum": (level * noisy).sum(),
        "gate_noisy_count": noisy.sum().float(),
    }


def shrink(model: Whisper, encoder_layers: Sequence[int] | None, decoder_layers: Sequence[int] | None) -> Whisper:
    """A smaller student from the chosen layers of a model (as in Distil-Whisper, arXiv:2311.00430, section 3)."""
    dims = model.dims
    chosen_encoder = _layers("model.encoder_layers", encoder_layers, dims.n_audio_layer)
    chosen_decoder = _layers("model.decoder_layers", decoder_layers, dims.n_text_layer)
    sizes = vars(dims) | {"n_audio_layer": len(chosen_encoder), "n_text_layer": len(chosen_decoder)}
    if model.dual is not None and model.dual.memory_layers > len(chosen_encoder):
        raise OptionError(
            f"model.encoder_layers is {chosen_encoder}: fewer layers than the {model.dual.memory_layers} that the "
            "secondary's memory has of its own"
        )
    student = Whisper(ModelDimensions(**sizes), model.dual, model.variable_audio_ctx)
    weights = {}
    for name, value in model.state_dict().items():
        part, *rest = name.split(".")
        chosen = chosen_encoder if part == "encoder" else chosen_decoder
        if rest and rest[0] == "blocks":
            if int(rest[1]) not in chosen:
                continue
            rest[1] = str(chosen.index(int(rest[1])))
        if name == "encoder.mixture":
            value = value[list(chosen)]
        weights[".".join([part, *rest])] = value
    student.load_state_dict(weights)
    student.knows_silence = model.knows_silence
    if len(chosen_decoder) == dims.n_text_layer:
        student.alignment_heads = model.alignment_heads
    return student.to(model.device)


def _layers(key: str, chosen: Sequence[int] | None, n_layer: int) -> list[int]:
    layers = list(range(n_layer)) if chosen is None else list(chosen)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < n_layer for layer in layers):
        raise OptionError(f"{key} is {layers}; the start model has layers 0 to {n_layer - 1}, each taken once")
    return layers


def taught_layers(student: Whisper, teacher: Whisper, options: ModelOptions) -> list[int]:
    """The teacher layer that each decoder layer of the student learns from: its origin, or evenly spread ones."""
    n, m = student.dims.n_text_layer, teacher.dims.n_text_layer
    if options.decoder_layers is not None and max(options.decoder_layers) < m:
        return list(options.decoder_layers)
    return [round((i + 1) * m / n) - 1 for i in range(n)] if n <= m else [i * m // n for i in range(n)]


def check_teacher(student: Whisper, teacher: Whisper, options: ObjectiveOptions) -> None:
    """Raise OptionError where an objective can't compare the two."""
    a, b = student.dims, teacher.dims
    if options.logits and a.n_vocab != b.n_vocab:
        raise OptionError(
            f"the teacher has {b.n_vocab} tokens and the student {a.n_vocab}: logits can't be compared; "
            "take a teacher of the same vocabulary or set objective.logits=0"
        )
    if options.encoder and a.n_audio_state != b.n_audio_state:
        raise OptionError(
            f"the encoders' widths differ ({a.n_audio_state} and {b.n_audio_state}): set objective.encoder=0"
        )
    if options.attention and a.n_text_state != b.n_text_state:
        raise OptionError(
            f"the decoders' widths differ ({a.n_text_state} and {b.n_text_state}): set objective.attention=0"
        )
    if a.n_mels != b.n_mels:
        raise OptionError(f"the teacher hears {b.n_mels} mel bands and the student {a.n_mels}: take another teacher")


def freeze(model: Whisper, parts: Sequence[str]) -> None:
    """Leave only what is to be trained with gradients. What may be frozen: recipe.FREEZABLE."""
    model.unfreeze()
    if "encoder" in parts:
        model.freeze_encoder()
    if "primary" in parts:
        model.freeze_primary_decoder()
    if "embedding" in parts:
        model.decoder.token_embedding.requires_grad_(False)
    for part, module in (("memory", model.encoder), ("secondary", model)):
        for name, parameter in module.named_parameters():
            if part in parts and is_second_branch(name):
                parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(f"freeze={list(parts)} leaves nothing to train")


def pad_tokens(x: Tensor, multiple: int, value: int, limit: int) -> Tensor:
    """[B, n] -> [B, m], m the next multiple within the limit: few shapes mean few compilations."""
    n = x.shape[1]
    return F.pad(x, (0, min(-n % multiple, max(0, limit - n))), value=value)
