"""Models of other packages that look like ours: they are recognised by their files, and named."""

from __future__ import annotations

from pathlib import Path

HEADS = {b"lmgg": "ggml", b"GGUF": "GGUF", b"TFL3": "TensorFlow Lite"}  # first bytes of whisper.cpp's and others' files
FILES = {  # a file in a folder -> the package that writes it
    "model.bin": "CTranslate2 (faster-whisper)",
    "ggml-*.bin": "ggml (whisper.cpp)",
    "*.gguf": "GGUF",
    "encoder_model*.onnx": "Optimum's ONNX",
    "flax_model.msgpack": "Flax",
    "tf_model.h5": "TensorFlow",
    "weights.npz": "MLX",
    "weights.safetensors": "MLX",
    "*.mlmodelc": "Core ML",
    "openvino_*.xml": "OpenVINO",
}


def foreign_format(path: Path) -> str | None:
    """The name of the other package's format that a file or folder is in; None for any other."""
    if path.is_dir():
        return next((name for pattern, name in FILES.items() if any(path.glob(pattern))), None)
    with path.open("rb") as file:
        head = file.read(8)
    found = HEADS.get(head[:4]) or HEADS.get(head[4:8])
    return f"{found} (whisper.cpp)" if found == "ggml" else found


def refusal(name: str) -> str:
    return f"a model in the format of {name}, which dawhisper does not read; name the model that it was made from"
