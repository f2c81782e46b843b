"""A stock Whisper in the formats of other packages: a folder of transformers, and from that one of CTranslate2.

Nothing is downloaded: the vocabulary is openai-whisper's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from whisper import __file__ as whisper_file
from whisper.tokenizer import Tokenizer

from dawhisper.checkpoint import HF_NAMES, HF_PARTS
from dawhisper.decoding import model_tokenizer, suppressed_tokens
from dawhisper.errors import CheckpointError
from dawhisper.model import Whisper

NAMES_IN_HF = {ours: theirs for theirs, ours in HF_NAMES.items()}
PARTS_IN_HF = {ours: theirs for theirs, ours in HF_PARTS.items()}


def to_transformers(model: Whisper, folder: Path) -> None:
    """Write config, weights (in the model's dtype), tokenizer and preprocessor that `transformers` loads."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    if model.dual is not None:
        raise CheckpointError("a model with a second branch can't be converted: other packages have no such decoder")
    dims, tokenizer = model.dims, model_tokenizer(model)
    config = WhisperConfig(
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
    )
    theirs: Any = WhisperForConditionalGeneration(config)
    theirs.to(model.dtype)
    theirs.load_state_dict(transformers_weights(model), strict=False)
    theirs.tie_weights()
    theirs.generation_config = GenerationConfig(**generation_values(model, tokenizer))
    theirs.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=dims.n_mels)
    extractor.save_pretrained(folder)
    WhisperProcessor(extractor, transformers_tokenizer(tokenizer)).save_pretrained(folder)


def transformers_weights(model: Whisper) -> dict[str, Tensor]:
    return {f"model.{transformers_name(name)}": tensor for name, tensor in model.state_dict().items()}


def transformers_name(name: str) -> str:
    """The inverse of what checkpoint.py does to the names of a Hugging Face folder."""
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
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(transformers_folder), copy_files=files).convert(str(folder), force=True)
