"""Tiny random models, ours beside openai-whisper's own code with the same weights; what they hear and say."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
import whisper
from torch import Tensor

from dawhisper.decoding import DecodingResult
from dawhisper.model import AudioFeatures, DualOptions, ModelDimensions, Whisper, is_second_branch

MULTILINGUAL = ModelDimensions(80, 1500, 64, 2, 2, 51865, 448, 64, 2, 2)
VARIANTS = {
    "multilingual": MULTILINGUAL,
    "english": replace(MULTILINGUAL, n_vocab=51864),
    "large-v3": replace(MULTILINGUAL, n_mels=128, n_vocab=51866),
    "turbo": replace(MULTILINGUAL, n_mels=128, n_vocab=51866, n_audio_layer=6, n_text_layer=4),
}
DUALS = {
    "full": DualOptions(),
    "no mixture": DualOptions(layer_mixture=False),
    "no noise embeddings": DualOptions(n_noise_embed=0),
    "plain": DualOptions(layer_mixture=False, n_noise_embed=0),
    "own layer": DualOptions(memory_layers=1),
    "own layers alone": DualOptions(memory_layers=2, layer_mixture=False, n_noise_embed=0),
}
FAST = {"sample_len": 24, "temperature": (0.0, 0.6)}
# likely enough not to fall back, and never silence
SURE = {"logprob_threshold": None, "no_speech_threshold": None, "compression_ratio_threshold": None}


def talkative(model: Whisper, eot_bias: float = 0.0, most: int | None = None) -> Whisper:
    """Make a random model say various things: what comes next depends on the position and the audio.

    (With its tied embeddings a plain random model repeats its last token.) `eot_bias` raises <|endoftext|>'s logit.
    With `most` tokens, the prompt's included, it is sure to end, and also sure of what it says.
    """
    with torch.no_grad():
        model.decoder.positional_embedding.normal_()
        model.decoder.token_embedding.weight.mul_(0.05)
        model.decoder.ln.weight.fill_(20.0)
        eot = model.decoder.token_embedding.weight[50257 - (not model.is_multilingual)]
        model.decoder.ln.bias.copy_(eot_bias * eot / eot.square().sum())
        if most is not None:
            model.decoder.positional_embedding[most - 1 :] = 1e3 * eot / eot.norm()
            model.decoder.ln.weight.fill_(60.0)
        for block in model.decoder.blocks:
            block.cross_attn.out.weight.mul_(10)
    return model


def save_openai(model: Whisper, path: Path) -> Path:
    """The model as a checkpoint in OpenAI's format; returns its path."""
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, path)
    return path


def pair(
    dims: ModelDimensions = MULTILINGUAL, eot_bias: float = 0.0, most: int | None = None
) -> tuple[Whisper, whisper.Whisper]:
    """Our model and openai-whisper's with the same random weights, `talkative`."""
    made = deepcopy(_pair(dims, eot_bias, most))
    torch.manual_seed(0)
    return made


@cache
def _pair(dims: ModelDimensions, eot_bias: float, most: int | None) -> tuple[Whisper, whisper.Whisper]:
    torch.manual_seed(0)
    ours = talkative(Whisper(dims).eval(), eot_bias, most)
    theirs = whisper.Whisper(whisper.ModelDimensions(**asdict(dims)))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


def trained(dual: DualOptions, dims: ModelDimensions = MULTILINGUAL, seed: int = 0) -> Whisper:
    """A dual model whose second branch has weights of its own everywhere, as after training."""
    torch.manual_seed(seed)
    model = Whisper(dims, replace(dual, init="random")).eval()
    for name, parameter in model.named_parameters():
        if is_second_branch(name) and ("gate" in name or parameter.ndim == 1):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def mels(n: int, n_mels: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, n_mels, 3000, generator=generator)


def inputs(dims=MULTILINGUAL, batch: int = 2, n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(batch, dims.n_mels, 3000, generator=generator)
    return mel, torch.randint(0, 50000, (batch, n), generator=generator)


def heard(avg_logprob: float = -0.5, ratio: float = 1.5, no_speech: float = 0.1) -> DecodingResult:
    features = AudioFeatures(torch.empty(0), torch.empty(0))
    return DecodingResult(features, "en", None, [], "", avg_logprob, no_speech, 0.0, ratio)
