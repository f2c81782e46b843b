"""Checkpoints: every kind of file, what storage costs, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import whisper
from helpers.models import save_openai
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from dawhisper import checkpoint, device
from dawhisper.checkpoint import OWN_MODEL, available_models, load_model, read_config
from dawhisper.errors import CheckpointError, OptionError
from dawhisper.formats.dawhisper import quantize_rows, save_model
from dawhisper.model import DualOptions, ModelDimensions, Whisper

ROOT = Path(__file__).resolve().parent.parent
DIMS = ModelDimensions(80, 1500, 64, 2, 2, 51865, 448, 64, 2, 2)
VARIANTS = {
    "multilingual": DIMS,
    "english": dataclasses.replace(DIMS, n_vocab=51864),
    "large-v3": dataclasses.replace(DIMS, n_mels=128, n_vocab=51866),
    "turbo": dataclasses.replace(DIMS, n_mels=128, n_vocab=51866, n_audio_layer=6, n_text_layer=1),
}
DUAL = DualOptions(n_noise_embed=3, gate_hidden=16)


def random_model(dims: ModelDimensions = DIMS, dual: DualOptions | None = None) -> Whisper:
    torch.manual_seed(0)
    model = Whisper(dims, dual).eval()
    for name, parameter in model.named_parameters():
        if name != "encoder.mixture":  # trained-looking values everywhere, the gate's last layer included
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(dims: ModelDimensions) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(2, dims.n_mels, 200, generator=generator)
    return mel, torch.randint(0, 50000, (2, 7), generator=generator)


@torch.no_grad()
def logits(model: Whisper) -> Tensor:
    return model(*inputs(model.dims))


@pytest.fixture
def openai_file(tmp_path: Path) -> Path:
    return save_openai(random_model(), tmp_path / "some.pt")


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ---- OpenAI files


@pytest.mark.parametrize("name", VARIANTS)
def test_openai_file_computes_what_whisper_does(name: str, tmp_path: Path) -> None:
    dims = dataclasses.replace(VARIANTS[name], n_audio_ctx=100)
    path = save_openai(random_model(dims), tmp_path / "some.pt")
    theirs, ours = whisper.load_model(str(path), device="cpu").eval(), load_model(path, device="cpu")
    assert not ours.training and ours.dtype == torch.float32 and ours.dual is None
    assert torch.equal(ours.alignment_heads, theirs.alignment_heads.to_dense())
    mel, tokens = inputs(dims)
    with torch.no_grad():
        assert (ours(mel, tokens) - theirs(mel, tokens)).abs().max() < 1e-4


def test_every_weight_is_loaded_and_none_is_left_empty(openai_file: Path) -> None:
    model, expected = load_model(openai_file, device="cpu"), random_model()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters())
    for (name, got), want in zip(model.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16", torch.float64, "int4"])
def test_dtype(openai_file: Path, dtype: str | torch.dtype) -> None:
    if dtype in ("fp16", "bf16"):
        model = load_model(openai_file, device="cpu", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {device.DTYPES[str(dtype)]}
    else:
        with pytest.raises(OptionError) as error:
            load_model(openai_file, device="cpu", dtype=dtype)
        one_line(error, "fp32")


def test_unknown_device(openai_file: Path) -> None:
    with pytest.raises(OptionError) as error:
        load_model(openai_file, device="gpu")
    one_line(error, "gpu", "cpu")
    with pytest.raises(OptionError):
        load_model(openai_file, device="cuda:99")


def test_second_branch_on_a_stock_model_computes_the_same(openai_file: Path) -> None:
    dual = load_model(openai_file, device="cpu", dual=DUAL)
    assert dual.dual == DUAL
    torch.testing.assert_close(logits(dual), logits(random_model()), atol=1e-4, rtol=0)


# ---- Hugging Face folders


def hf_name(name: str) -> str:
    """The Hugging Face name of one of our parameters, written down here independently of the loader."""
    for ours, theirs in [
        ("encoder.positional_embedding", "encoder.embed_positions.weight"),
        ("decoder.positional_embedding", "decoder.embed_positions.weight"),
        ("token_embedding", "embed_tokens"),
        ("ln_post", "layer_norm"),
        ("decoder.ln.", "decoder.layer_norm."),
        (".cross_attn_ln", ".encoder_attn_layer_norm"),
        (".attn_ln", ".self_attn_layer_norm"),
        (".mlp_ln", ".final_layer_norm"),
        (".cross_attn.", ".encoder_attn."),
        (".attn.", ".self_attn."),
        (".query.", ".q_proj."),
        (".key.", ".k_proj."),
        (".value.", ".v_proj."),
        (".out.", ".out_proj."),
        (".mlp.0", ".fc1"),
        (".mlp.2", ".fc2"),
        (".blocks.", ".layers."),
    ]:
        name = name.replace(ours, theirs)
    return name


def save_hf(model: Whisper, folder: Path, layout: str) -> Path:
    folder.mkdir()
    d = model.dims
    config = {
        "model_type": "whisper",
        "num_mel_bins": d.n_mels,
        "max_source_positions": d.n_audio_ctx,
        "d_model": d.n_audio_state,
        "encoder_attention_heads": d.n_audio_head,
        "encoder_layers": d.n_audio_layer,
        "vocab_size": d.n_vocab,
        "max_target_positions": d.n_text_ctx,
        "decoder_attention_heads": d.n_text_head,
        "decoder_layers": d.n_text_layer,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": [[0, 1], [1, 0]]}))
    tensors = {"model." + hf_name(name): tensor for name, tensor in model.state_dict().items()}
    if layout == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif layout == "bin":
        # pickled models hold the tied output layer as well
        tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        ending = "safetensors" if layout == "safetensors shards" else "bin"
        stem = "model" if ending == "safetensors" else "pytorch_model"
        names = sorted(tensors)
        weight_map = {name: f"{stem}-0000{1 + (i % 2)}-of-00002.{ending}" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            part = {name: tensors[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_hugging_face_folder(layout: str, tmp_path: Path) -> None:
    model = random_model(VARIANTS["turbo"] if layout == "bin shards" else DIMS)
    if layout == "bin shards":  # head (1, 0) of generation_config.json is not there
        with pytest.raises(CheckpointError) as error:
            load_model(save_hf(model, tmp_path / "hf", layout), device="cpu")
        one_line(error, "alignment head (1, 0)")
        (tmp_path / "hf" / "generation_config.json").unlink()
        loaded = load_model(tmp_path / "hf", device="cpu")
    else:
        loaded = load_model(save_hf(model, tmp_path / "hf", layout), device="cpu")
        assert loaded.alignment_heads.tolist() == [[False, True], [True, False]]
    assert torch.equal(logits(loaded), logits(model))


def test_hugging_face_folder_with_something_wrong(tmp_path: Path) -> None:
    def fails(folder: Path, *parts: str) -> None:
        with pytest.raises(CheckpointError) as error:
            load_model(folder, device="cpu")
        one_line(error, str(folder), *parts)

    (tmp_path / "none").mkdir()
    fails(tmp_path / "none", "config.json")
    folder = save_hf(random_model(), tmp_path / "hf", "bin shards")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    fails(folder, "pytorch_model-00002-of-00002.bin", "missing")
    (folder / "pytorch_model.bin.index.json").unlink()
    fails(folder, "no weights")
    (folder / "adapter_model.safetensors").touch()
    fails(folder, "merge")
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    fails(folder, "wav2vec2")
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    fails(folder, "num_mel_bins")
    (folder / "config.json").write_text("{")
    fails(folder, "JSON")


def test_untied_output_layer_is_refused(tmp_path: Path) -> None:
    folder = save_hf(random_model(), tmp_path / "hf", "bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        load_model(folder, device="cpu")
    one_line(error, "output layer")


# ---- folders as people have them


@pytest.mark.parametrize("told_by", ["added_tokens", "tokenizer_config", "tokenizer", "generation", "forced ids"])
@pytest.mark.parametrize("added", [1, 2, 39])
def test_added_tokens_are_left_out(told_by: str, added: int, tmp_path: Path) -> None:
    """Where Whisper's special tokens are is read from the folder; one more row is not a hundredth language."""
    model = random_model()
    wide = random_model(dataclasses.replace(DIMS, n_vocab=DIMS.n_vocab + added))
    wide.decoder.token_embedding.weight.data[: DIMS.n_vocab] = model.decoder.token_embedding.weight.data
    for name, value in model.state_dict().items():
        if "token_embedding" not in name:
            wide.state_dict()[name].copy_(value)
    folder = save_hf(wide, tmp_path / "hf", "safetensors")
    tokens = {f"<tok{i}>": DIMS.n_vocab + i for i in range(added)}
    config = json.loads((folder / "config.json").read_text())
    if told_by == "added_tokens":
        (folder / "added_tokens.json").write_text(json.dumps(tokens))
    elif told_by == "tokenizer_config":
        decoder = {"50363": {"content": "<|notimestamps|>"}, "51865": {"content": "<tok0>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    elif told_by == "tokenizer":
        listed = [{"id": 50359, "content": "<|transcribe|>"}, {"id": 50364, "content": "<|0.00|>"}]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    elif told_by == "generation":
        (folder / "generation_config.json").write_text(json.dumps({"no_timestamps_token_id": 50363}))
    else:
        forced = [[1, 50259], [2, 50359], [3, 50363]]
        (folder / "config.json").write_text(json.dumps({**config, "forced_decoder_ids": forced}))
    with pytest.warns(UserWarning, match=f"{added} tokens that are not Whisper's are left out"):
        loaded = load_model(folder, device="cpu")
    assert loaded.dims == DIMS and loaded.num_languages == 99
    assert torch.equal(logits(loaded), logits(model))


def test_a_vocabulary_that_nothing_explains_is_refused(tmp_path: Path) -> None:
    folder = save_hf(random_model(dataclasses.replace(DIMS, n_vocab=51904)), tmp_path / "hf", "safetensors")
    for files, part in (
        ({}, "51904 tokens"),
        ({"generation_config.json": {"no_timestamps_token_id": 51000}}, "disagree"),
        (
            {
                "generation_config.json": {"no_timestamps_token_id": 50363},
                "tokenizer_config.json": {"added_tokens_decoder": {"50364": {"content": "<|notimestamps|>"}}},
            },
            "disagree",
        ),
    ):
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as error:
            load_model(folder, device="cpu")
        one_line(error, str(folder), part)
    for n_vocab in (51866, 51870):  # 80 mel channels have 99 languages
        path = save_openai(random_model(dataclasses.replace(DIMS, n_vocab=n_vocab)), tmp_path / "m.pt")
        with pytest.raises(CheckpointError) as error:
            load_model(path, device="cpu")
        one_line(error, f"{n_vocab} tokens", "Hugging Face folder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output", ["tied", "beside", "alone"])
def test_weights_of_any_type_and_output(dtype: torch.dtype, output: str, tmp_path: Path) -> None:
    """The output layer may be left out, stored beside the embedding, or stand for it."""
    model = random_model().to(dtype).float()
    folder = save_hf(model, tmp_path / "hf", "safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in load((folder / "model.safetensors").read_bytes()).items()}
    embedding = tensors["model.decoder.embed_tokens.weight"]
    if output != "tied":
        tensors["proj_out.weight"] = embedding.clone()
    if output == "alone":
        del tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(load_model(folder, device="cpu")), logits(model))


def lora(model: Whisper, folder: Path, base: str, **config: object) -> tuple[Path, Whisper]:
    """An adapter of rank 4 for the queries and values as peft writes it, and the model with it."""
    generator = torch.Generator().manual_seed(5)
    tensors, want = {}, random_model(model.dims)
    want.load_state_dict(model.state_dict())
    scale = 16 / 2 if config.get("use_rslora") else 16 / 4
    for name, weight in model.state_dict().items():
        if name.endswith(("attn.query.weight", "attn.value.weight")):
            a, b = (torch.randn(shape, generator=generator) * 0.05 for shape in ((4, 64), (64, 4)))
            stem = "base_model.model.model." + hf_name(name).removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            want.state_dict()[name].copy_(weight + scale * b @ a)
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4, "lora_alpha": 16, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, want


@pytest.mark.parametrize("place", ["beside", "path", "cache", "Hugging Face's cache"])
def test_an_adapter_is_merged_into_its_model(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    base = "openai/whisper-base"
    if place == "beside":
        base = save_hf(model, tmp_path / "mine", "safetensors").name
    elif place == "path":
        base = str(save_hf(model, tmp_path / "mine", "bin"))
    elif place == "cache":
        (tmp_path / "cache" / "whisper").mkdir(parents=True)
        save_openai(model, tmp_path / "cache" / "whisper" / "base.pt")
    else:
        snapshots = tmp_path / "hf_home" / "hub" / "models--openai--whisper-base" / "snapshots"
        snapshots.mkdir(parents=True)
        save_hf(model, snapshots / "0123abc", "safetensors")
    for use_rslora in (False, True):
        folder, want = lora(model, tmp_path / f"adapter{use_rslora}", base, use_rslora=use_rslora)
        got = load_model(folder, device="cpu")
        assert not torch.equal(logits(want), logits(model))
        torch.testing.assert_close(logits(got), logits(want), atol=1e-4, rtol=0)


def test_an_adapter_that_can_not_be_merged_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    model = random_model()

    def fails(folder: Path, *parts: str) -> None:
        with pytest.raises(CheckpointError) as error:
            load_model(folder, device="cpu")
        one_line(error, str(folder), *parts)

    merge = "it is an adapter: merge it into its model first"
    fails(lora(model, tmp_path / "far", "openai/whisper-base")[0], merge, "load_model('base')")
    fails(lora(model, tmp_path / "mine", "me/my-whisper")[0], merge, "me/my-whisper")
    base = str(save_openai(model, tmp_path / "base.pt"))
    fails(lora(model, tmp_path / "dora", base, use_dora=True)[0], "DoRA")
    fails(lora(model, tmp_path / "ia3", base, peft_type="IA3")[0], "IA3", "merge")
    half, _ = lora(model, tmp_path / "half", base)
    tensors = load((half / "adapter_model.safetensors").read_bytes())  # not mapped: it is written again
    save_file({name: t for name, t in tensors.items() if "lora_A" in name}, half / "adapter_model.safetensors")
    fails(half, "but one of lora_A and lora_B")
    other, _ = lora(model, tmp_path / "other", base)
    save_file({name: t[:, :32].contiguous() for name, t in tensors.items()}, other / "adapter_model.safetensors")
    fails(other, "does not fit")
    (other / "adapter_model.safetensors").unlink()
    fails(other, "adapter_model.safetensors")


def test_folders_of_others_are_named(tmp_path: Path) -> None:
    def fails(path: Path, *parts: str) -> None:
        with pytest.raises(CheckpointError) as error:
            load_model(path, device="cpu")
        one_line(error, str(path), *parts)

    for name, part in (
        ("model.bin", "CTranslate2"),
        ("ggml-base.bin", "whisper.cpp"),
        ("x.gguf", "GGUF"),
        ("encoder_model.onnx", "Optimum"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
    ):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"lmgg" + bytes(100))
        fails(folder, part)
        (folder / "config.json").write_text('{"model_type": "whisper"}')
        fails(folder, part)
    fails(tmp_path / "ggml-base" / "ggml-base.bin", "whisper.cpp")
    trainer = tmp_path / "trainer"
    for step in (500, 1000, 90):
        (trainer / f"checkpoint-{step}").mkdir(parents=True)
    fails(trainer, "Trainer", "checkpoint-1000,")
    save_hf(random_model(), trainer / "checkpoint-2000", "safetensors")
    load_model(trainer / "checkpoint-2000", device="cpu")


# ---- dawhisper files


@pytest.mark.parametrize("dual", [None, DUAL, DualOptions(layer_mixture=False, n_noise_embed=0)])
def test_fp32_file_is_exact(dual: DualOptions | None, tmp_path: Path) -> None:
    model = random_model(dual=dual)
    model.variable_audio_ctx = model.knows_silence = True
    model.alignment_heads = torch.tensor([[True, False], [False, True]])
    save_model(model, tmp_path / "new" / "m.safetensors", dtype="fp32", base_model="tiny", recipe={"lr": 1e-4})
    loaded = load_model(tmp_path / "new" / "m.safetensors", device="cpu")
    assert loaded.dual == dual and loaded.dims == model.dims and loaded.variable_audio_ctx
    assert loaded.knows_silence
    assert torch.equal(loaded.alignment_heads, model.alignment_heads)
    assert torch.equal(logits(loaded), logits(model))
    config = read_config(tmp_path / "new" / "m.safetensors")
    assert (config["base_model"], config["recipe"], config["storage"]) == ("tiny", {"lr": 1e-4}, "fp32")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.safetensors"]  # nothing temporary stays


def test_fp16_file_is_half_the_size_and_exact_for_fp16_weights(tmp_path: Path) -> None:
    model = random_model(dual=DUAL).half()
    save_model(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 2.05 * sum(p.numel() for p in model.state_dict().values())
    loaded = load_model(tmp_path / "m.safetensors", device="cpu", dtype="fp16")
    for (name, got), want in zip(loaded.state_dict().items(), model.state_dict().values()):
        assert torch.equal(got, want), name


def test_loss_of_int8(tmp_path: Path) -> None:
    """At most 1/254 of a row's largest weight; logits of a random dual model move by less than 2 % of their spread."""
    model = random_model(dual=DUAL)
    save_model(model, tmp_path / "m.safetensors", dtype="int8")
    assert (tmp_path / "m.safetensors").stat().st_size < 1.15 * sum(p.numel() for p in model.state_dict().values())
    loaded = load_model(tmp_path / "m.safetensors", device="cpu")
    quantized = [name for name in load_file(tmp_path / "m.safetensors") if name.endswith(":scale")]
    assert "decoder.token_embedding.weight:scale" in quantized and "encoder.conv1.weight:scale" in quantized
    for (name, got), want in zip(loaded.state_dict().items(), model.state_dict().values()):
        if name + ":scale" in quantized:
            largest = want.flatten(1).abs().amax(1)
            error = (got - want).flatten(1).abs().amax(1) / largest
            assert error.max() <= 1.002 / 254, name
        else:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    got, want = logits(loaded), logits(model)
    assert (got - want).std() < 0.02 * want.std()


def test_int8_rows_of_any_scale() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-7, -5e-8], [1e-4, -1e-4], [3.0, 1.0], [1e5, -3e4]])
    values, scale = quantize_rows(rows)
    error = (values.float() * scale.float()[:, None] - rows).abs().amax(1)
    assert values.dtype == torch.int8 and scale.dtype == torch.float16 and values.tolist()[0] == [0, 0]
    # half a step, with a step of 1/127 of the row's largest weight or fp16's smallest number
    assert (error <= 0.5 * torch.maximum(rows.abs().amax(1) / 127 * 1.07, torch.tensor(2.0**-24))).all()


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_what_cannot_be_stored(storage: str, tmp_path: Path) -> None:
    model = random_model()
    model.decoder.ln.bias.data[3] = 1e6
    with pytest.raises(CheckpointError) as error:
        save_model(model, tmp_path / "m.safetensors", dtype=storage)
    one_line(error, "decoder.ln.bias", "fp32")
    model.decoder.ln.bias.data[3] = float("nan")
    with pytest.raises(CheckpointError) as error:
        save_model(model, tmp_path / "m.safetensors", dtype=storage)
    one_line(error, "decoder.ln.bias", "NaN")
    with pytest.raises(OptionError):
        save_model(model, tmp_path / "m.safetensors", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        save_model(random_model(), tmp_path / "file" / "m.safetensors")
    one_line(error, "cannot be written")


def test_second_branch_twice_is_refused(tmp_path: Path) -> None:
    save_model(random_model(dual=DUAL), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors", device="cpu", dual=DUAL).dual == DUAL
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "m.safetensors", device="cpu", dual=DualOptions())
    one_line(error, "second branch already")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(random_model(), path)
    config = read_config(path) | {"format_version": 99}
    save_file(load(path.read_bytes()), path, metadata={"dawhisper": json.dumps(config)})
    with pytest.raises(CheckpointError) as error:
        load_model(path, device="cpu")
    one_line(error, "99", "update dawhisper")


# ---- wrong files


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = random_model().state_dict()
    del state["encoder.conv1.bias"], state["decoder.ln.weight"]
    for layer in range(5):
        state[f"extra.{layer}"] = torch.zeros(1)
    state["decoder.ln.bias"] = torch.zeros(65)
    state["encoder.ln_post.bias"] = torch.zeros(64, dtype=torch.int8)
    torch.save({"dims": dataclasses.asdict(DIMS), "model_state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "m.pt", device="cpu")
    one_line(
        error,
        "2 missing: encoder.conv1.bias, decoder.ln.weight",
        "5 unexpected: extra.0, extra.1, extra.2 and 2 more",
        "decoder.ln.bias [65] instead of [64]",
        "encoder.ln_post.bias torch.int8",
    )


@pytest.mark.parametrize(
    "change",
    [{"n_mels": 0}, {"n_mels": "80"}, {"n_vocab": 51866}, {"n_text_head": 3}, {"n_text_layer": 999_999}, {"more": 1}],
)
def test_wrong_dimensions(change: dict[str, object], tmp_path: Path) -> None:
    content = {"dims": dataclasses.asdict(DIMS) | change, "model_state_dict": random_model().state_dict()}
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "m.pt", device="cpu")
    one_line(error, "m.pt", "dimensions")


class RunsCode:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "hf"])
def test_a_pickle_that_runs_code_is_refused(kind: str, tmp_path: Path) -> None:
    hack = {"dims": dataclasses.asdict(DIMS), "model_state_dict": RunsCode(tmp_path / "ran")}
    path = tmp_path / "evil.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hack))
    elif kind == "hf":
        folder = save_hf(random_model(), tmp_path / "hf", "bin")
        torch.save(hack, folder / "pytorch_model.bin")
        path = folder
    else:
        torch.save(hack, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(CheckpointError) as error:
        load_model(path, device="cpu")
    one_line(error, *(["never pickled code"] if kind == "pickle" else ["refused", "mkdir"]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file(kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"m.{kind}"
    model = random_model()
    save_openai(model, path) if kind == "pt" else save_model(model, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError) as error:
        load_model(path, device="cpu")
    one_line(error, path.name, "again")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    def fails(path: Path, *parts: str) -> None:
        with pytest.raises(CheckpointError) as error:
            load_model(path, device="cpu")
        one_line(error, path.name, *parts)

    (tmp_path / "text.pt").write_text("hello, this is no model\n" * 100)
    fails(tmp_path / "text.pt", "not a checkpoint")
    (tmp_path / "noise.pt").write_bytes(hashlib.shake_256(b"x").digest(10_000))
    fails(tmp_path / "noise.pt", "not a checkpoint")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as z:
        z.writestr("a.txt", "hello")
    fails(tmp_path / "zip.pt", "not a checkpoint")
    torch.save(random_model().state_dict(), tmp_path / "state.pt")
    fails(tmp_path / "state.pt", "dims")
    torch.save([1, 2], tmp_path / "list.pt")
    fails(tmp_path / "list.pt", "dims")
    torch.save({"dims": dataclasses.asdict(DIMS), "model_state_dict": {"a": 3}}, tmp_path / "numbers.pt")
    fails(tmp_path / "numbers.pt", "tensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    fails(tmp_path / "model.safetensors", "folder")


# ---- names and downloads


def test_names_are_its_own_and_openais() -> None:
    assert available_models() == [OWN_MODEL, *whisper.available_models()]


def test_without_a_name_the_model_of_the_package() -> None:
    model = load_model(device="cpu")
    assert model.dual is not None and model.dual.memory_layers == 6 and model.variable_audio_ctx
    assert model.knows_silence
    openais = Whisper(model.dims)
    openais.set_alignment_heads(whisper._ALIGNMENT_HEADS["base"])
    assert torch.equal(model.alignment_heads, openais.alignment_heads)
    text = model.transcribe(ROOT / "assets" / "speech_noisy.opus").text  # stock base hears "remain to stand"
    assert "so that the waters were made to stand firm as a wall on either side" in text.lower()


def test_the_package_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "dawhisper" / "checkpoint.py"))
    with pytest.raises(CheckpointError, match="install dawhisper again, or name another model"):
        load_model()


@pytest.mark.parametrize(("name", "near"), [("bse", "base"), ("large-v4", "large-v3"), ("tiny_en", "tiny.en")])
def test_unknown_name_gets_near_names(name: str, near: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(name)
    one_line(error, name, f"did you mean {near}")


@pytest.mark.parametrize("name", ["xyzzy", "openai/whisper-small", "missing.pt"])
def test_unknown_name_or_path_gets_a_way_out(name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(name)
    one_line(error, name, "base", "file")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, openai_file: Path, tmp_path: Path) -> dict[str, str]:
    """A model table with one entry, served from a folder."""
    content = openai_file.read_bytes()
    served = tmp_path / "served" / hashlib.sha256(content).hexdigest() / "mini.pt"
    served.parent.mkdir(parents=True)
    served.write_bytes(content)
    models = {"mini": served.as_uri()}
    monkeypatch.setattr(whisper, "_MODELS", models)
    # base85 of gzipped booleans: heads (0, 1) and (1, 0) of 2 x 2
    import base64
    import gzip

    dump = base64.b85encode(gzip.compress(bytes([0, 1, 1, 0])))
    monkeypatch.setattr(whisper, "_ALIGNMENT_HEADS", {"mini": dump})
    return models


def test_download_once_and_check(table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_model("mini", device="cpu")
    assert model.alignment_heads.tolist() == [[False, True], [True, False]]
    cached = tmp_path / "cache" / "whisper" / "mini.pt"
    assert [p.name for p in cached.parent.iterdir()] == ["mini.pt"]
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_fetch", lambda *_: pytest.fail("downloaded twice"))
        load_model("mini", device="cpu")
    cached.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="downloaded again"):
        load_model("mini", device="cpu")
    assert cached.stat().st_size > 1000


def test_damaged_download_is_not_kept(table: dict[str, str], tmp_path: Path) -> None:
    served = Path(table["mini"].removeprefix("file://"))
    served.write_bytes(served.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        load_model("mini", device="cpu", download_root=tmp_path / "root")
    one_line(error, "checksum")
    assert not list((tmp_path / "root").iterdir())


def test_offline_says_how_to_name_a_local_file(table: dict[str, str], tmp_path: Path) -> None:
    table["mini"] = "http://127.0.0.1:9/0000/mini.pt"  # nothing listens there
    with pytest.raises(CheckpointError) as error:
        load_model("mini", device="cpu", download_root=tmp_path / "root")
    one_line(error, "mini", "cannot be downloaded", "/path/to/mini.pt")
    assert not list((tmp_path / "root").iterdir())


# ---- real weights


@pytest.mark.parametrize("fixture", ["base_path", "tiny_en_path"])
def test_real_weights(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Exactly Whisper's logits; fp16 files change nothing; int8 moves log-probabilities by less than 0.1 on average."""
    path: Path = request.getfixturevalue(fixture)
    theirs, ours = whisper.load_model(str(path), device="cpu").eval(), load_model(path, device="cpu")
    mel = whisper.log_mel_spectrogram(torch.randn(16000 * 5, generator=torch.Generator().manual_seed(0)), padding=16000)
    tokens = torch.randint(0, 50000, (1, 8), generator=torch.Generator().manual_seed(1))
    mel = whisper.pad_or_trim(mel, 3000)[None]
    with torch.no_grad():
        want, logits = theirs(mel, tokens), ours(mel, tokens)
        assert (logits - want).abs().max() < 1e-4
        save_model(ours, tmp_path / "half.safetensors")
        half = load_model(tmp_path / "half.safetensors", device="cpu", dtype="fp32")
        assert torch.equal(half(mel, tokens), logits)
        save_model(ours, tmp_path / "int8.safetensors", dtype="int8")
        got = load_model(tmp_path / "int8.safetensors", device="cpu")(mel, tokens)
        change = (got.log_softmax(-1) - want.log_softmax(-1)).abs()
        assert (change * want.softmax(-1)).sum(-1).mean() < 0.1
    assert (tmp_path / "int8.safetensors").stat().st_size < 0.54 * path.stat().st_size
