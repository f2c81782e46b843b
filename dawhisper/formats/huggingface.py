"""Whisper models as folders of transformers, read and written, and from these of CTranslate2.

Nothing is downloaded: the vocabulary is openai-whisper's own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whisper import __file__ as whisper_file
from whisper.tokenizer import Tokenizer

from dawhisper.decoding import model_tokenizer, suppressed_tokens
from dawhisper.errors import CheckpointError, one_line
from dawhisper.model import ModelDimensions, Whisper

from .foreign import foreign_format, refusal
from .stored import Stored, checked_dims, checked_tensors, head_pairs, read_json, tensors_of
from .vocabulary import whisper_rows

EMBEDDING = "decoder.token_embedding.weight"
HF_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
HF_PARTS = {  # parts of a Hugging Face parameter name -> openai-whisper's
    "layers": "blocks",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
}
HF_NAMES = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}
NAMES_IN_HF = {ours: theirs for theirs, ours in HF_NAMES.items()}
PARTS_IN_HF = {ours: theirs for theirs, ours in HF_PARTS.items()}


def read_huggingface(folder: Path) -> Stored:
    """config.json and weights, safetensors or pickled. Raises CheckpointError."""
    if weights_of(folder) is None:
        if newest := newest_checkpoint(folder):
            raise CheckpointError(f"{folder}: a Trainer's folder; name its newest checkpoint, {newest}, as the model")
        if other := foreign_format(folder):
            raise CheckpointError(f"{folder}: {refusal(other)}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in this folder; name a Hugging Face Whisper folder or a file")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{folder}: a model of type {config.get('model_type')!r}; only Whisper models can be used"
        )
    try:
        dims = ModelDimensions(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_audio_state=config["d_model"],
            n_audio_head=config["encoder_attention_heads"],
            n_audio_layer=config["encoder_layers"],
            n_vocab=config["vocab_size"],
            n_text_ctx=config["max_target_positions"],
            n_text_state=config["d_model"],
            n_text_head=config["decoder_attention_heads"],
            n_text_layer=config["decoder_layers"],
        )
    except KeyError as e:
        raise CheckpointError(f"{folder / 'config.json'}: it lacks {one_line(e)}; download the folder again") from e
    generation = folder / "generation_config.json"
    heads = read_json(generation).get("alignment_heads") if generation.is_file() else None
    tensors = checked_tensors(folder, {openai_name(name): tensor for name, tensor in stored_tensors(folder)})
    output = tensors.pop("proj_out.weight", None)
    embedding = tensors.setdefault(EMBEDDING, output) if output is not None else tensors.get(EMBEDDING)
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise CheckpointError(
            f"{folder}: its output layer differs from its token embedding, which no Whisper model has"
        )
    checked = checked_dims(folder, dataclasses.asdict(dims))
    rows = whisper_rows(folder, config)
    if embedding is not None and rows < len(embedding) == checked.n_vocab:
        warnings.warn(f"{folder}: {checked.n_vocab - rows} tokens that are not Whisper's are left out", stacklevel=4)
        tensors[EMBEDDING] = embedding[:rows]
        checked = dataclasses.replace(checked, n_vocab=rows)
    return Stored(str(folder), checked, tensors, alignment_heads=head_pairs(folder, heads))


def newest_checkpoint(folder: Path) -> Path | None:
    """The last of the checkpoints that a Trainer wrote into a folder."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()]
    return max(found, key=lambda path: int(path.name.split("-")[-1]), default=None)


def weights_of(folder: Path) -> Path | None:
    return next((folder / name for name in HF_WEIGHTS if (folder / name).is_file()), None)


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder: one file or several, safetensors or pickled."""
    found = weights_of(folder)
    if found is None:
        adapter = any(folder.glob("adapter_*"))
        hint = (
            "it is an adapter: merge it into its model first" if adapter else f"it needs one of {', '.join(HF_WEIGHTS)}"
        )
        raise CheckpointError(f"{folder}: no weights in this folder; {hint}")
    files = [found]
    if found.suffix == ".json":
        weight_map = read_json(found).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{found}: no weight_map in it; download the folder again")
        files = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this part of the model is missing; download the folder again")
        yield from tensors_of(file)


def openai_name(name: str) -> str:
    name = str(name).removeprefix("model.")
    return HF_NAMES.get(name) or ".".join(HF_PARTS.get(part, part) for part in name.split("."))


def hide_broken_torchaudio() -> None:
    """Tells transformers that there is no torchaudio, where there is one that doesn't load beside this torch.

    Its Whisper needs none, but imports what it finds, and dies of that.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        from transformers import utils

        utils.is_torchaudio_available = lambda: False


def to_transformers(model: Whisper, folder: Path) -> None:
    """Write config, weights (in the model's dtype), tokenizer and preprocessor that `transformers` loads."""
    hide_broken_torchaudio()
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    if model.dual is not None:
        raise CheckpointError("a model with a second branch can't be converted: other packages have no such decoder")
    tokenizer = model_tokenizer(model)
    theirs: Any = WhisperForConditionalGeneration(transformers_config(model.dims))
    theirs.to(model.dtype)
    theirs.load_state_dict(transformers_weights(model), strict=False)
    theirs.tie_weights()
    theirs.generation_config = GenerationConfig(**generation_values(model, tokenizer))
    theirs.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=model.dims.n_mels)
    extractor.save_pretrained(folder)
    WhisperProcessor(extractor, transformers_tokenizer(tokenizer)).save_pretrained(folder)


def transformers_config(dims: ModelDimensions, **more: Any) -> Any:
    """The WhisperConfig of a model of these dimensions."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=dims.n_vocab,
        num_mel_bins=dims.n_mels,
        d_model=dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        decoder_layers=dims.n_text_layer,
        decoder_attention_heads=dims.n_text_head,
        decoder_ffn_dim=4 * dims.n_text_state,
        max_source_positions=dims.n_audio_ctx,
        max_target_positions=dims.n_text_ctx,
        **more,
    )


def transformers_weights(model: Whisper) -> dict[str, Tensor]:
    return {f"model.{transformers_name(name)}": tensor for name, tensor in model.state_dict().items()}


def transformers_name(name: str) -> str:
    """The inverse of `openai_name`."""
    if name in NAMES_IN_HF:
        return NAMES_IN_HF[name]
    name = name.replace("mlp.0.", "fc1.").replace("mlp.2.", "fc2.")
    return ".".join(PARTS_IN_HF.get(part, part) for part in name.split("."))


def generation_values(model: Whisper, tokenizer: Tokenizer) -> dict[str, Any]:
    """How transformers and CTranslate2 are told of Whisper's special tokens."""
    values: dict[str, Any] = {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
        "is_multilingual": model.is_multilingual,
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "prev_sot_token_id": tokenizer.sot_prev,
        "suppress_tokens": sorted({*suppressed_tokens(tokenizer, "-1")}),
        "begin_suppress_tokens": [*tokenizer.encode(" "), tokenizer.eot],
        "max_initial_timestamp_index": 50,
        "max_length": model.dims.n_text_ctx,
        "alignment_heads": model.alignment_heads.nonzero().tolist(),
        "return_timestamps": False,
    }
    if model.is_multilingual:
        codes = zip(tokenizer.all_language_codes, tokenizer.all_language_tokens)
        values["lang_to_id"] = {f"<|{code}|>": token for code, token in codes}
        values["task_to_id"] = {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate}
    return values


def transformers_tokenizer(tokenizer: Tokenizer) -> object:
    """openai-whisper's byte pairs and special tokens, as a tokenizer of transformers."""
    from transformers import AddedToken, WhisperTokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = Path(whisper_file).parent / "assets" / tokenizer.encoding.name
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(file))
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    made = WhisperTokenizer(vocab=vocab | {"<|endoftext|>": tokenizer.eot}, merges=merges)
    is_time = {token: tokenizer.special_tokens[token] >= tokenizer.timestamp_begin for token in special}
    made.add_tokens([AddedToken(token, special=not is_time[token], normalized=False) for token in special])
    return made


def to_ctranslate2(transformers_folder: Path, folder: Path) -> None:
    """Write a folder that faster-whisper loads, in fp32; it quantizes as it loads."""
    hide_broken_torchaudio()
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(transformers_folder), copy_files=files).convert(str(folder), force=True)
