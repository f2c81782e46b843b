"""How MFU counts: the arithmetic of one training step over what the device could do in that time.

    MFU = 3 * forward FLOPs * windows per second / peak dense FLOPs per second

- Forward: 2 FLOPs per multiply-add of every matrix product and convolution: the linear layers over the positions that
  they run on, the attentions' two products (2 * 2 * queries * keys * width; the decoder's causal self-attention counts
  half), and the logits. Norms, softmax, GELU, embeddings and the loss count nothing.
- Backward counts twice the forward, as usual (PaLM, arXiv:2204.02311, appendix B). Frozen parts still count in full.
- A teacher's forward pass, augmentation, spectrograms, recomputation under gradient checkpointing and padding of the
  batch to multiples count nothing: they lower the MFU. Positions of the window (1,500 for 30 s) count whether or not
  they hold sound, as they do in Whisper.
- Peak: the vendor's dense rate of the precision in use, without sparsity.
"""

from __future__ import annotations

from dawhisper.model import DualOptions, ModelDimensions

PEAK_TFLOPS = {  # dense bf16/fp16 by part of the device's name, most specific first (vendors' data sheets)
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "GH200": 989,
    "B200": 2250,
    "B100": 1750,
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "4090": 165,
    "3090": 71,
    "MI300X": 1307,
}


def forward_flops(dims: ModelDimensions, dual: DualOptions | None, n_frames: int, n_tokens: int) -> float:
    """FLOPs of one window's forward pass: n_frames encoder positions (1500 for 30 s), n_tokens decoder positions."""
    t, n, d = n_frames, n_tokens, dims.n_audio_state
    convolutions = 2 * 3 * d * (2 * t * dims.n_mels + t * d)
    layers = dims.n_audio_layer + (0 if dual is None else dual.memory_layers)
    encoder = layers * (2 * 12 * d * d * t + 4 * t * t * d)
    d = dims.n_text_state
    branches = 1 if dual is None else 2
    self_attention = 2 * 4 * d * d * n + 2 * n * n * d
    cross_attention = branches * (2 * 2 * d * d * n + 2 * 2 * d * d * t + 4 * n * t * d)
    gate = 0 if dual is None else 2 * n * (3 * d * dual.gate_hidden + dual.gate_hidden)
    if dual is not None and dual.n_noise_embed:
        gate += 2 * 2 * d * d * dual.n_noise_embed + 4 * n * dual.n_noise_embed * d
    mlp = 2 * 8 * d * d * n
    decoder = dims.n_text_layer * (self_attention + cross_attention + gate + mlp)
    return float(convolutions + encoder + decoder + 2 * n * d * dims.n_vocab)


def training_flops(dims: ModelDimensions, dual: DualOptions | None, n_frames: int, n_tokens: int) -> float:
    """FLOPs of one window's forward and backward pass."""
    return 3 * forward_flops(dims, dual, n_frames, n_tokens)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's peak FLOPs per second, or None where it is not known (CPUs, new GPUs): then there is no MFU."""
    for part, tera in PEAK_TFLOPS.items():
        if part in device_name:
            return tera * 1e12 * (0.5 if precision == "fp32" else 1.0)  # TF32 runs at half the rate
    return None
