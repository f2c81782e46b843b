"""Changes to models before training: fewer layers for a smaller student, its teacher's layers, frozen weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dawhisper.errors import OptionError
from dawhisper.model import ModelDimensions, Whisper, is_second_branch

from .objective import ObjectiveOptions
from .recipe import ModelOptions


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
    if (options.encoder or options.layers) and a.n_audio_state != b.n_audio_state:
        raise OptionError(
            f"the encoders' widths differ ({a.n_audio_state} and {b.n_audio_state}): set objective.encoder=0 and "
            "objective.layers=0"
        )
    if options.attention and a.n_text_state != b.n_text_state:
        raise OptionError(
            f"the decoders' widths differ ({a.n_text_state} and {b.n_text_state}): set objective.attention=0"
        )
    if a.n_mels != b.n_mels:
        raise OptionError(f"the teacher hears {b.n_mels} mel bands and the student {a.n_mels}: take another teacher")


def freeze(model: Whisper, parts: Sequence[str]) -> None:
    """Leave only what is to be trained with gradients. What may be frozen: recipe.Freezable."""
    encoder, decoder = model.encoder.named_parameters, model.decoder.named_parameters
    frozen: dict[str, list[Tensor]] = {
        "encoder": [p for name, p in encoder() if not is_second_branch(name)],
        "memory": [p for name, p in encoder() if is_second_branch(name)],
        "primary": [p for name, p in decoder() if not is_second_branch(name)],
        "embedding": [model.decoder.token_embedding.weight],
        "secondary": [p for name, p in model.named_parameters() if is_second_branch(name)],
    }
    model.requires_grad_(True)
    for part in parts:
        for parameter in frozen[part]:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(f"freeze={list(parts)} leaves nothing to train")
