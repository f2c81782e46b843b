"""Training data: manifests and tar shards -> batches of audio with Whisper's target tokens, on the device.

The samples come in the order of order.py, so that a run's place in the data is one number.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dawhisper.audio import N_SAMPLES_PER_TOKEN, SAMPLE_RATE, from_int16
from dawhisper.distributed import onto
from dawhisper.errors import DataError, OptionError
from dawhisper.media import open_media

from .manifest import (
    MAX_SECONDS,
    MIN_SECONDS,
    SLACK_SECONDS,
    Report,
    Utterance,
    read_audio,
    read_manifest,
)
from .order import Order
from .processes import in_processes
from .targets import IGNORE, Target, TargetOptions, Targets

__all__ = [
    "Batch",
    "Loader",
    "Report",
    "TargetOptions",
    "Targets",
    "Utterance",
    "make_loader",
    "read_audio",
    "read_manifest",
    "silence_targets",
]

PAD_SAMPLES = SAMPLE_RATE // 2  # batches are padded to whole half seconds: few shapes, and fast FFTs
PAD_TOKENS = 8


# ---- batches ------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A training batch on the device."""

    audio: Tensor  # [B, S] float32, zero from lengths on; S is a whole number of half seconds
    lengths: Tensor  # [B] int64 samples
    tokens: Tensor  # [B, n] int64 decoder input, padded with <|endoftext|>
    labels: Tensor  # [B, n] int64 what the decoder should say next; -100 = no loss
    has_text: Tensor  # [B] bool: the labels come from a transcript; False: from the teacher, or there are none
    utterances: list[Utterance]
    sot: Tensor  # [B] int64 index of <|startoftranscript|>: 0, or what follows the prompt
    begin: Tensor  # [B] int64 index of the last token before the text
    eot: int
    no_speech: int
    timestamp_begin: int
    position: int  # place of the global batch's first sample in the stream

    def retimed(self, lengths: Tensor) -> Batch:
        """The same batch with the time stamps of clips that are now `lengths` [B] samples long (a new speed)."""
        first = self.timestamp_begin
        before, after = ((n / N_SAMPLES_PER_TOKEN).round() for n in (self.lengths, lengths))  # the stamps of the ends
        stretch = (after / before)[:, None]

        def stretched(x: Tensor) -> Tensor:
            return torch.where(x > first, first + ((x - first) * stretch).round().long().clamp(max=1500), x)

        return replace(self, lengths=lengths, tokens=stretched(self.tokens), labels=stretched(self.labels))


def silence_targets(batch: Batch, mask: Tensor) -> Batch:
    """Give the clips of `mask` [B] (bool, on the device) the target of a window without speech.

    <|nospeech|> is what follows <|startoftranscript|>, as in Whisper's own training; and once language, task and
    time stamp mode are given all the same (decoding always does), <|endoftext|> follows: an empty text.
    """
    place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    sot, begin, silent = batch.sot[:, None], batch.begin[:, None], mask[:, None]
    tokens = torch.where(silent & (place > begin), batch.eot, batch.tokens)
    # The label just before `begin` (which time stamp mode) stays as it is; language and task have no right answer.
    labels = torch.where(silent & ~((place == begin - 1) & (place > sot)), IGNORE, batch.labels)
    labels = torch.where(silent & (place == begin), batch.eot, labels)
    labels = torch.where(silent & (place == sot), batch.no_speech, labels)
    return replace(batch, tokens=tokens, labels=labels, has_text=batch.has_text | mask)


# ---- the loader ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    utterance: Utterance
    previous: Utterance | None
    seed: tuple[int, int]  # of this sample's draws: (seed, position)


@dataclass(frozen=True)
class _Plan:
    """What a worker is asked for: a batch, and what may stand in for items that turn out to be bad."""

    items: list[_Item]
    spares: list[_Item]
    position: int


class _Reader(Dataset[dict[str, Any]]):
    """Runs in the workers: a plan -> a batch on the CPU, audio as int16. Never raises for bad data."""

    def __init__(self, options: TargetOptions):
        self.options = options
        self.targets: Targets | None = None

    def __getitem__(self, plan: _Plan) -> dict[str, Any]:
        if self.targets is None:  # made in the worker: a tokenizer does not travel between processes
            self.targets = Targets(self.options)
        good: list[tuple[_Item, np.ndarray, Target]] = []
        bad: list[tuple[str, str]] = []
        spares = list(plan.spares)
        for item in plan.items:
            candidate: _Item | None = item
            while candidate is not None:
                try:
                    audio = read_audio(candidate.utterance)
                    good.append((candidate, audio, self._target(candidate, len(audio))))
                    break
                except DataError as error:
                    bad.append((candidate.utterance.name, str(error)))
                candidate = replace(spares.pop(0), seed=item.seed) if spares else None
        if not good:
            return {"bad": bad}
        for k in range(len(plan.items) - len(good)):  # no spare was good: repeat some, so that the batch keeps its size
            good.append(good[k])
        lengths = [len(audio) for _, audio, _ in good]
        audio16 = torch.zeros(len(good), padded_samples(max(lengths)), dtype=torch.int16)
        for row, (_, audio, _) in zip(audio16, good):
            row[: len(audio)] = torch.from_numpy(audio)
        return {
            "audio": audio16,
            "lengths": torch.tensor(lengths),
            **collate_targets([target for _, _, target in good], self.targets.tokenizer.eot, self.options.n_text_ctx),
            "utterances": [item.utterance for item, _, _ in good],
            "position": plan.position,
            "bad": bad,
        }

    def _target(self, item: _Item, n_samples: int) -> Target:
        assert self.targets is not None
        return self.targets(item.utterance, n_samples, np.random.default_rng(item.seed), item.previous)


def padded_samples(n_samples: int) -> int:
    return -(-n_samples // PAD_SAMPLES) * PAD_SAMPLES


def collate_targets(targets: Sequence[Target], eot: int, n_text_ctx: int) -> dict[str, Tensor]:
    """Pad targets to one length, a multiple of 8 where the decoder's context allows."""
    longest = max(len(t.tokens) for t in targets)
    width = max(longest, min(-(-longest // PAD_TOKENS) * PAD_TOKENS, n_text_ctx))
    return {
        "tokens": torch.tensor([t.tokens + [eot] * (width - len(t.tokens)) for t in targets]),
        "labels": torch.tensor([t.labels + [IGNORE] * (width - len(t.labels)) for t in targets]),
        "has_text": torch.tensor([t.has_text for t in targets]),
        "sot": torch.tensor([t.sot for t in targets]),
        "begin": torch.tensor([t.begin for t in targets]),
    }


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made. batch_size: clips of each rank.

    workers: processes that decode; 0 decodes in this one. prefetch: batches that each worker makes ahead.
    shuffle: another order in each epoch. bucket: clips of like length in a batch.
    """

    targets: TargetOptions
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 2
    device: torch.device | str = "cpu"
    prefetch: int = 4
    shuffle: bool = True
    bucket: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0 or not 0 <= self.rank < self.world_size:
            raise OptionError(
                f"batch_size {self.batch_size}, workers {self.workers}, rank {self.rank} of {self.world_size}: "
                "out of range"
            )

    @property
    def global_batch(self) -> int:
        """Clips of all ranks together."""
        return self.batch_size * self.world_size


class Loader:
    """An endless iterable of `Batch`. Make it with `make_loader`.

    `position` counts global samples (those of all ranks) handed out so far; `epoch` follows from it. `report` names
    what was skipped; the workers' findings arrive with their batches. Break out of a loop over it, or let it end with
    an exception, and its workers end too.
    """

    def __init__(self, utterances: list[Utterance], options: LoaderOptions, report: Report):
        self.utterances, self.options, self.report = utterances, options, report
        self.device = torch.device(options.device)
        self.position = 0
        durations = [u.duration for u in utterances]
        self.order = Order(durations, options.seed, options.global_batch, options.shuffle, options.bucket)
        self._by_length = np.argsort(durations, kind="stable")
        self._place = np.empty_like(self._by_length)  # utterance -> its place in _by_length
        self._place[self._by_length] = np.arange(len(utterances))
        tokenizer = Targets(options.targets).tokenizer
        self._special = {
            "eot": tokenizer.eot,
            "no_speech": tokenizer.no_speech,
            "timestamp_begin": tokenizer.timestamp_begin,
        }

    def __len__(self) -> int:
        """Batches of one epoch, rounded up."""
        return -(-len(self.utterances) // self.options.global_batch)

    @property
    def epoch(self) -> int:
        return self.position // len(self.utterances)

    @property
    def hours(self) -> float:
        return sum(u.duration for u in self.utterances) / 3600

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "epoch": self.epoch,
            "seed": self.order.seed,
            "block": self.order.block,  # of the run that was begun: another number of ranks keeps its order
            "samples": len(self.utterances),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader was. Takes effect with the next `iter`.

        With other data than before the place in the stream means nothing: the epoch's beginning is taken.
        """
        self.order = Order(
            self.order.durations, int(state["seed"]), int(state["block"]), self.order.shuffle, self.order.bucket
        )
        self.position = int(state["position"])
        if state.get("samples", len(self.utterances)) != len(self.utterances):
            warnings.warn("the training data has changed since the checkpoint: starting its epoch anew", stacklevel=2)
            self.position = int(state["epoch"]) * len(self.utterances)

    def __iter__(self) -> Iterator[Batch]:
        for data in self._batches():
            for what, why in data["bad"]:
                self.report.add(what, why)
            if "audio" not in data:
                what, why = data["bad"][0]
                raise DataError(
                    f"not one clip of a whole batch could be read, nor any near it; the first: {what}: {why}"
                )
            self.position = data["position"] + self.options.global_batch
            yield self._to_device(data)

    def _batches(self) -> Iterator[dict[str, Any]]:
        reader = _Reader(self.options.targets)
        if self.options.workers == 0:
            yield from (reader[plan] for plan in self._plans())
            return
        loader = DataLoader(
            reader,
            batch_size=None,  # a plan is a whole batch
            sampler=self._plans(),  # type: ignore[arg-type]  # endless; drawn from as workers get free
            num_workers=self.options.workers,
            prefetch_factor=self.options.prefetch,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        batches = iter(loader)
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a data worker died ({error}): out of memory? lower workers or batch_size") from error
        finally:
            del batches  # ends the workers

    def _plans(self) -> Iterator[_Plan]:
        """This rank's share of each global batch, from the position on."""
        position, count = self.position, self.options.batch_size
        while True:
            first = position + self.options.rank * count
            indices = self.order.take(first, count)
            items = [self._item(index, first + k) for k, index in enumerate(indices)]
            spares = [self._item(index, first) for index in self._near(indices[0], set(indices))]
            yield _Plan(items, spares, position)
            position += self.options.global_batch

    def _item(self, index: int, position: int) -> _Item:
        utterance = self.utterances[index]
        previous = self.utterances[index - 1] if index and self.options.targets.prompt else None
        if previous is not None and not follows(previous, utterance):
            previous = None
        return _Item(utterance, previous, (self.order.seed, position))

    def _near(self, index: int, taken: set[int], count: int = 4) -> list[int]:
        """Other utterances of about the same duration."""
        place = int(self._place[index])
        window = range(max(0, place - count - len(taken)), min(len(self.utterances), place + count + len(taken) + 1))
        near = sorted((abs(p - place), int(self._by_length[p])) for p in window)
        return [i for _, i in near if i not in taken][:count]

    def _to_device(self, data: dict[str, Any]) -> Batch:
        tensors: dict[str, Any] = {
            key: onto(self.device, value) for key, value in data.items() if isinstance(value, Tensor)
        }
        audio = from_int16(tensors.pop("audio"))
        return Batch(audio=audio, utterances=data["utterances"], position=data["position"], **tensors, **self._special)


class MemoryLoader(Loader):
    """A Loader that holds all audio as int16 on the device: for small data; no workers, no waiting."""

    def __init__(
        self, clips: Sequence[np.ndarray], utterances: list[Utterance], options: LoaderOptions, report: Report
    ):
        super().__init__(utterances, options, report)
        self._n_samples = [len(clip) for clip in clips]
        lengths = torch.tensor(self._n_samples)
        self._offsets = lengths.cumsum(0) - lengths
        try:
            self._audio = torch.from_numpy(np.concatenate(clips)).to(self.device)
        except torch.cuda.OutOfMemoryError:
            raise OptionError(
                f"{self.hours:.1f} hours of audio do not fit on {self.device}: leave in_memory off"
            ) from None
        self._index = {id(u): i for i, u in enumerate(self.utterances)}

    def _batches(self) -> Iterator[dict[str, Any]]:
        reader = _Reader(self.options.targets)
        reader.targets = Targets(self.options.targets)
        for plan in self._plans():
            rows = [self._index[id(item.utterance)] for item in plan.items]
            n_samples = [self._n_samples[row] for row in rows]
            targets = [reader._target(item, n) for item, n in zip(plan.items, n_samples)]
            lengths = torch.tensor(n_samples)
            time = torch.arange(padded_samples(max(n_samples)), device=self.device)
            length, offset = onto(self.device, lengths)[:, None], onto(self.device, self._offsets[rows])[:, None]
            position = offset + torch.minimum(time, length - 1)
            yield {
                "audio": self._audio[position] * (time < length),
                "lengths": lengths,
                **collate_targets(targets, self._special["eot"], self.options.targets.n_text_ctx),
                "utterances": [item.utterance for item in plan.items],
                "position": plan.position,
                "bad": [],
            }


def follows(previous: Utterance, utterance: Utterance) -> bool:
    """May the first one's text stand before the second's as a prompt: the same recording, or the same speaker?"""
    if utterance.start is not None and previous.audio == utterance.audio and utterance.offset is None:
        return previous.end is not None and previous.end <= utterance.start + 0.5
    return (
        utterance.speaker is not None
        and (utterance.speaker, utterance.source, utterance.language)
        == (previous.speaker, previous.source, previous.language)
    )  # fmt: skip


def make_loader(
    manifests: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    targets: TargetOptions,
    batch_size: int,
    *,
    in_memory: bool = False,
    **more: Any,
) -> Loader:
    """An endless loader of training batches; keyword arguments are the fields of LoaderOptions.

    manifests: what `read_manifest` takes, one or several. in_memory: decode everything once and keep it on the device.
    Bad items are skipped and named in `loader.report`. Raises DataError at once when nothing usable is left.
    """
    options = LoaderOptions(targets, batch_size, **more)
    report, usable, chooser = Report(), [], Targets(targets)
    for manifest in [manifests] if isinstance(manifests, (str, os.PathLike)) else manifests:
        for utterance in with_durations(read_manifest(manifest, report)):
            why = _unusable(utterance, targets, chooser)
            if why:
                report.add(utterance.name, why)
            else:
                usable.append(utterance)
    if usable and not in_memory:
        return Loader(usable, options, report)
    clips, kept = _decode_all(usable, chooser, report, options.workers)
    if not kept:
        raise DataError(f"nothing to train on in {manifests}: {report}")
    return MemoryLoader(clips, kept, options, report)


def _unusable(u: Utterance, options: TargetOptions, chooser: Targets) -> str:
    """Why an utterance can't be used, as far as its manifest line tells; empty when it can."""
    if not u.duration > 0:
        return "no duration: and the file does not tell it"
    if u.duration > MAX_SECONDS + SLACK_SECONDS:
        return f"longer than {MAX_SECONDS:g} s: {u.duration:.1f} s"
    if u.duration < MIN_SECONDS:
        return f"shorter than {MIN_SECONDS:g} s: {u.duration:.2f} s"
    if options.require_text and chooser.choose(u) is None:
        if u.text and u.text.strip():
            return f"language unknown to the model: {u.language}"
        return "empty text: and the run needs text"
    return ""


def with_durations(utterances: list[Utterance]) -> list[Utterance]:
    """Fill in the durations that a hand-made manifest leaves out, from the files' headers."""
    missing = [i for i, u in enumerate(utterances) if not u.duration > 0]
    if missing:
        with ThreadPoolExecutor(8) as pool:
            for i, seconds in zip(missing, pool.map(lambda i: _header_seconds(utterances[i]), missing)):
                utterances[i] = replace(utterances[i], duration=seconds)
    return utterances


def _header_seconds(u: Utterance) -> float:
    import av

    if u.end is not None:
        return u.end - (u.start or 0.0)
    if u.offset is not None:
        return 0.0
    try:
        with open_media(u.audio) as container:
            return max(0.0, (container.duration or 0) / av.time_base - (u.start or 0.0))
    except (av.FFmpegError, OSError, ValueError):
        return MIN_SECONDS  # let the loader find out and say what is wrong with it


def _decode_all(
    utterances: list[Utterance], targets: Targets, report: Report, workers: int
) -> tuple[list[np.ndarray], list[Utterance]]:
    """Decode everything; `workers` 0: in as many processes as there are cores."""
    from tqdm import tqdm

    clips, kept = [], []
    results = in_processes(partial(_read, targets=targets), utterances, workers)
    for u, (clip, why) in zip(
        utterances, tqdm(results, "decoding", len(utterances), unit="clip", leave=False, disable=None)
    ):
        if clip is None:
            report.add(u.name, why)
        else:
            clips.append(clip)
            kept.append(u)
    return clips, kept


def _read(u: Utterance, targets: Targets) -> tuple[np.ndarray | None, str]:
    """The sound of an utterance that can be trained on; else None and why it can't."""
    try:
        audio = read_audio(u)
        targets(u, len(audio), np.random.default_rng(0))
        return audio, ""
    except DataError as error:
        return None, str(error)


def _start_worker(number: int) -> None:
    """Ctrl-C and SIGTERM, which reach a whole process group, are the main process's affair: it saves, and then ends its
    workers. One thread each; damage goes to the report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
