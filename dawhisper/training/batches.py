"""From manifests to the inputs of a step: batches, mixed with noise on the device, as spectrograms and tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dawhisper.audio import N_SAMPLES_PER_TOKEN, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim
from dawhisper.data.loader import Batch, make_loader, silence_targets
from dawhisper.distributed import World, onto
from dawhisper.errors import OptionError
from dawhisper.model import Whisper
from dawhisper.noise.augment import NOISE_LEVELS, Augment, spec_augment
from dawhisper.noise.mixing import Mixture
from dawhisper.noise.random_numbers import step_generator
from dawhisper.noise.recordings import NoiseBank

from .inputs import Inputs, pad_tokens
from .losses import IGNORE, frame_mask, noise_dominance
from .recipe import Recipe

SPEC_AUGMENT, CONTEXT, HELD = 1, 2, 3  # streams of random numbers beside the augmentation's own


@dataclass(frozen=True)
class Ahead:
    """The micro-batches of the next step, made early, and the state of `Batches` before they were made."""

    step: int
    micro_batches: list[Inputs]
    state: dict[str, Any]


class Batches:
    """The micro-batches of each step. What it draws depends on the seed, the rank and the step alone.

    A step's batches are made while the device still works on the step before, on a stream of their own.
    waited: seconds that the device had nothing to do because the next batch was not there.
    """

    def __init__(self, recipe: Recipe, model: Whisper, teacher: Whisper | None, world: World, token_multiple: int = 1):
        data, dims = recipe.data, model.dims
        if not data.train:
            raise OptionError("no training data: set data.train to one or more manifests")
        self.recipe, self.dims, self.teacher, self.device = recipe, dims, teacher, world.device
        self.token_multiple = token_multiple
        targets = replace(
            data.targets,
            multilingual=model.is_multilingual,
            num_languages=model.num_languages,
            n_text_ctx=dims.n_text_ctx,
        )
        self.loader = make_loader(
            data.train,
            targets,
            data.batch_size,
            seed=recipe.seed,
            rank=world.rank,
            world_size=world.size,
            workers=data.workers,
            device=world.device,
            in_memory=data.in_memory,
        )
        bank = partial(NoiseBank.from_manifest, device=world.device, workers=data.workers)
        self.augment = Augment(
            recipe.augment,
            bank(data.noise) if data.noise else None,
            bank(data.rir, trim_silence=False) if data.rir else None,
            recipe.seed,
            world.rank,
            bank(data.babble) if data.babble else None,
        )
        level = recipe.augment.noise_level
        self.snr = NOISE_LEVELS[level] if level else recipe.augment.snr
        self.batches: Iterator[Batch] | None = None
        self.waited = 0.0
        cuda = world.device.type == "cuda"
        self.done = torch.cuda.Event() if cuda else None
        self.stream = torch.cuda.Stream(world.device) if cuda else None
        self.ahead: Ahead | None = None

    def step(self, step: int) -> list[Inputs]:
        """The micro-batches of one optimiser step."""
        if self.ahead is None or self.ahead.step != step:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self.begin(step)
        assert self.ahead is not None
        micro_batches, self.ahead = self.ahead.micro_batches, None
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.stream)
            for x in itertools.chain(*micro_batches):
                if x is not None:
                    x.record_stream(here)  # its memory is not given away before this stream is through with it
        return micro_batches

    def begin(self, step: int) -> None:
        """Start to make the step's micro-batches: call it when the step before is queued on the device."""
        state = self.state_dict()
        if self.recipe.data.snr_curriculum:
            low, high = self.snr
            self.augment.snr = (high - (high - low) * min(1.0, step / self.recipe.data.snr_curriculum), high)
        n = self.recipe.loop.accumulate
        with torch.cuda.stream(self.stream):  # None is the stream in use
            micro_batches = [self.prepare(self._next(), step * n + i) for i in range(n)]
        self.ahead = Ahead(step, micro_batches, state)

    def mark(self) -> None:
        """Call it when a step is queued on the device: once it is done, the device waits for the next batch."""
        if self.done is not None:
            self.done.record()

    def _next(self) -> Batch:
        if self.batches is None:
            self.batches = iter(self.loader)
        started = time.perf_counter()
        batch = next(self.batches)
        if self.done is None or self.done.query():  # else the device still had work: it did not wait
            self.waited += time.perf_counter() - started
        return batch

    def prepare(self, batch: Batch, index: int) -> Inputs:
        """Mix a batch with noise and turn it into the student's and the teacher's input; index: of the micro-batch."""
        o, mels = self.recipe.objective, self.dims.n_mels
        mixture = self.augment(batch.audio, batch.lengths, index)
        batch = silence_targets(batch.retimed(mixture.lengths), mixture.noise_only)
        n_frames = self._context(index, mixture.audio.shape[1])
        n_samples = n_frames * N_SAMPLES_PER_TOKEN

        mel = self._heard(mixture.audio, mixture, n_samples, index)
        if mixture.second is not None:
            mel = torch.cat([mel, self._heard(mixture.second, mixture, n_samples, index)], dim=1)
        clean_mel: Tensor | None = None
        if self.teacher is not None:  # which was trained on full windows, unless it says otherwise
            heard = n_samples if self.teacher.variable_audio_ctx else self.dims.n_audio_ctx * N_SAMPLES_PER_TOKEN
            clean_mel = log_mel_spectrogram(pad_or_trim(mixture.clean, heard), mels)
        pad = {"multiple": self.token_multiple, "limit": self.dims.n_text_ctx}
        return Inputs(
            mel,
            pad_tokens(batch.tokens, value=batch.eot, **pad),
            pad_tokens(batch.labels, value=IGNORE, **pad),
            mixture.snr_db,
            frame_mask(mixture.lengths, n_frames),
            clean_mel,
            log_mel_spectrogram(pad_or_trim(mixture.noise, n_samples), mels) if o.noise_mel else None,
            noise_dominance(mixture.clean, mixture.noise, n_frames) if o.noise_attention else None,
            self._held(index, mixture.snr_db) if o.hold_primary or o.hold_secondary else None,
        )

    def _heard(self, audio: Tensor, mixture: Mixture, n_samples: int, index: int) -> Tensor:
        """What a branch hears: audio [B, S] -> [B, n_mels, 2T], masked in the same places for both."""
        mel = log_mel_spectrogram(pad_or_trim(audio, n_samples), self.dims.n_mels)
        if not self.recipe.data.spec_augment:
            return mel
        frames = mixture.lengths // (N_SAMPLES_PER_TOKEN // 2)
        return spec_augment(mel, self.augment.generator(index, SPEC_AUGMENT), frames=frames)

    def _held(self, index: int, snr_db: Tensor) -> Tensor:
        """Which windows are heard through one branch alone: 1 the primary, 0 the secondary, nan both. -> [B, 1, 1]"""
        o = self.recipe.objective
        draw = onto(self.device, torch.rand(len(snr_db), generator=self.augment.generator(index, HELD)))
        clean, noisy = snr_db == torch.inf, torch.isfinite(snr_db)
        held = torch.full_like(snr_db, torch.nan).masked_fill(clean & (draw < o.hold_primary), 1.0)
        return held.masked_fill(noisy & (draw < o.hold_secondary), 0.0)[:, None, None]

    def _context(self, index: int, n_samples: int) -> int:
        """Encoder positions of this micro-batch: the whole window, or its longest clip and one second more."""
        loop, full = self.recipe.loop, self.dims.n_audio_ctx
        if not loop.variable_ctx:
            return full
        draw = torch.rand((), generator=step_generator(self.recipe.seed, 0, index, CONTEXT)).item()
        if draw >= loop.variable_ctx:
            return full
        blocks = -(-(n_samples + SAMPLE_RATE) // (N_SAMPLES_PER_TOKEN * loop.ctx_multiple))
        return min(full, blocks * loop.ctx_multiple)

    @property
    def dropped(self) -> int:
        return len(self.loader.report)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on from: what was made ahead and not taken is to be made again."""
        if self.ahead is not None:
            return self.ahead.state
        return {"loader": self.loader.state_dict(), "augment": self.augment.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ahead = None
        self.loader.load_state_dict(state["loader"])
        self.augment.load_state_dict(state["augment"])

    def close(self) -> None:
        """End the workers."""
        self.batches = None
