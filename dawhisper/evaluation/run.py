"""`dawhisper evaluate`: word errors of several models on the same seeded mixtures, by noise and SNR.

>>> from dawhisper.evaluation.run import EvaluateOptions, evaluate
>>> results = evaluate(EvaluateOptions(["test/manifest.jsonl"], models=["base", "mine.safetensors"], noise=["noise/"]))

Hypotheses are appended to OUT/hypotheses*.jsonl as they come; a rerun decodes only what is missing there. Under
torchrun the batches are dealt out to the ranks; they are the same batches, so the results are those of one process.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from whisper.tokenizer import LANGUAGES

from dawhisper.audio import N_SAMPLES, SAMPLE_RATE
from dawhisper.checkpoint import OWN_MODEL
from dawhisper.decoding import language_code
from dawhisper.distributed import World
from dawhisper.errors import DataError, OptionError
from dawhisper.files import json_lines
from dawhisper.front_end import FRONT_END_MIX, FRONT_END_SNR, FrontEnd, shares_of
from dawhisper.noise.mixing import Mixture
from dawhisper.noise.recordings import NoiseBank
from dawhisper.options import option
from dawhisper.window import mel_batch

from . import metrics, recognizers, tables
from .conditions import (
    CONDITION_KINDS,
    DEFAULT_KINDS,
    DEFAULT_SNRS,
    Condition,
    EvaluationItem,
    Mixer,
    conditions,
    items_of,
    read_items,
    write_wav,
)
from .gates import GateReading, read_gates, summarize
from .protocols import PROTOCOLS, known_protocol, utterances_of
from .recognizers import EVALUATED_DTYPES, Decoding, ModelSpec, Ours, Recognizer
from .scores import Hypothesis, Scorer


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, and how.

    manifests: JSON lines with "audio" and "text". models: see recognizers.py; the first one is the baseline.
    protocol: one of protocols.py, with its kinds and SNRs; the manifests are then folders of its corpus.
    noise, rirs: folders or manifests of recordings for the kinds real and noise-only, and of room impulse responses.
    kinds, snrs: see conditions.py; snrs in dB; no kinds: clean white babble real reverb noise-only, but not
        real where there is no noise. out: folder of the results.
    limit: only the first utterances of each manifest (babble is still made of all of them).
    language: of all utterances; None takes each one's from the manifest; with "auto" the models detect it, and the
        manifest's is that of the normaliser alone.
    dtype: fp32, fp16, bf16 or, on a CPU, int8; None is fp16 on a GPU and fp32 elsewhere.
    device: "auto", "cpu", "cuda", "cuda:N".
    normalizer: "auto" (English for English, else basic), "english", "basic" or "none".
    bootstrap_samples: of every interval and test. write_audio: folder for the mixtures, as WAV.
    front_end, front_end_mix, front_end_snr, front_end_choose: measure every model behind this enhancer too, with this
        share, below this SNR, beside what it hears without (dawhisper/front_end.py).
    gates: measure the gate and attention of dual models too. plots: draw PNGs, if matplotlib is installed.
    """

    manifests: Sequence[str] = option(
        help="JSON lines with audio and text; or a folder with one", positional=True, metavar="MANIFEST"
    )
    models: Sequence[str] = option(
        (OWN_MODEL,),
        "name or path; openai:NAME_OR_PATH, faster:NAME_OR_PATH, hf:FOLDER, cpp:FILE for other packages; "
        "LABEL=... to label it; once for each model, the first one is what others are compared with; "
        f"{OWN_MODEL} by default",
        name="model",
        append=True,
    )
    protocol: str | None = option(
        None, "the positional folders are corpora, read and mixed as others report on them", choices=[*PROTOCOLS]
    )
    noise: Sequence[str] = option((), "recordings of noise, for the kinds real and noise-only", metavar="DIR")
    rirs: Sequence[str] = option((), "room impulse responses for reverb; made up by default", name="rir", metavar="DIR")
    kinds: Sequence[str] = option(
        (), f"of {' '.join(CONDITION_KINDS)}; by default {' '.join(DEFAULT_KINDS)}", metavar="KIND"
    )
    snrs: Sequence[float] = option(DEFAULT_SNRS, "of the noise", name="snr", metavar="DB")
    out: str = option("evaluation", "folder for the results", metavar="DIR")
    seed: int = option(0, "of the mixtures and the bootstrap")
    limit: int | None = option(None, "only the first N utterances of each manifest", metavar="N")
    batch_size: int = option(16, "utterances decoded together")
    beam_size: int | None = option(None, "beams; greedy by default")
    fallback: bool = option(False, "decode as transcribe does, with temperature fallback, one at a time", flag=True)
    rerank: str | None = option(
        None, "mbr: of beams and samples the text nearest to all samples; dawhisper's models alone", choices=["mbr"]
    )
    language: str | None = option(None, "of all utterances; auto detects it; the manifest's by default")
    dtype: str | None = option(
        None, "fp16 on a GPU and fp32 elsewhere by default", choices=["fp32", "fp16", "bf16", "int8"]
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto is a GPU if there is one")
    normalizer: str = option("auto", "auto: by language", choices=["auto", "english", "basic", "none"])
    bootstrap_samples: int = option(10_000, "of every interval and test", metavar="N")
    write_audio: str | None = option(None, "write the mixtures there as WAV, to listen to", metavar="DIR")
    front_end: str | None = option(
        None, "measure every model behind this cleaner too", choices=["deepfilternet"], metavar="NAME"
    )
    front_end_mix: str | float | Sequence[float] = option(
        FRONT_END_MIX, "share of the cleaned recording; 0,0.6: a share for each branch", metavar="SHARE"
    )
    front_end_snr: float | None = option(
        FRONT_END_SNR, "dB of speech over noise from which on all stays as it is; None: never", metavar="DB"
    )
    front_end_choose: bool = option(
        False, "hear what is cleaned as it is, too, and keep the likelier text; dawhisper's models alone"
    )
    gates: bool = option(True, "leave out the gate and attention of dual models", flag=True)
    plots: bool = option(True, "leave out the PNGs", flag=True)

    def __post_init__(self) -> None:
        if not self.manifests:
            raise OptionError("nothing to evaluate on: give a manifest (JSON lines with audio and text)")
        for name in ("limit", "batch_size", "beam_size", "bootstrap_samples", "seed"):
            value, least = getattr(self, name), int(name != "seed")
            if value is not None and value < least:
                raise OptionError(f"{name} is at least {least}, not {value}")
        if self.dtype is not None and self.dtype not in (*EVALUATED_DTYPES, "int8"):
            raise OptionError(f"unknown dtype {self.dtype!r}; use one of {', '.join(EVALUATED_DTYPES)}, int8")
        if self.language not in (None, "auto"):
            language_code(str(self.language))
        shares_of(self.front_end_mix)
        metrics.normalizer(self.normalizer, None)
        if self.protocol is not None:
            protocol = known_protocol(self.protocol)
            object.__setattr__(self, "kinds", self.kinds or protocol.kinds)
            object.__setattr__(self, "snrs", protocol.snrs if self.snrs == DEFAULT_SNRS else self.snrs)
        if not self.kinds:
            made = [kind for kind in DEFAULT_KINDS if self.noise or kind != "real"]
            object.__setattr__(self, "kinds", tuple(made))


def evaluate(options: EvaluateOptions) -> tables.Results | None:
    """Measure, write the results to `options.out` and return them (on the first rank; None on others).

    Raises a DawhisperError for models, manifests, recordings and options that can't be used, before decoding starts
    wherever that can be known.
    """
    wanted = conditions(options.kinds, options.snrs)
    models = recognizers.parse_models(options.models)
    if options.front_end:
        heard = options.front_end, options.front_end_mix, options.front_end_snr, options.front_end_choose
        models += recognizers.behind(models, FrontEnd(*heard))
    recognizers.check_models(models, options.dtype, options.rerank)
    language = None if options.language in (None, "auto") else language_code(str(options.language))
    if options.protocol is None:
        manifests = read_items(options.manifests, language)
    else:
        taken: set[str] = set()
        corpora = [utterances_of(options.protocol, Path(folder)) for folder in options.manifests]
        manifests = [items_of(*pair, language, taken) for pair in zip(corpora, options.manifests)]
    items = [item for manifest in manifests for item in manifest[: options.limit]]
    mixer = Mixer(
        [item for manifest in manifests for item in manifest],
        options.seed,
        _bank(options.noise, "--noise", trim_silence=True) if {"real", "noise-only"} & set(options.kinds) else None,
        _bank(options.rirs, "--rir", trim_silence=False) if "reverb" in options.kinds else None,
    )
    mixer.check(options.kinds)
    scorer = Scorer(items, wanted, options.normalizer, options.bootstrap_samples, options.seed)
    if not any(scorer.references.values()):
        raise DataError("no reference has a word left after normalisation: there is nothing to count errors against")
    world = World.join(options.device)
    try:
        if options.write_audio:
            write_mixtures(Path(options.write_audio), mixer, items[world.rank :: world.size], wanted)
        hypotheses = [h for spec in models for h in _evaluate(spec, options, mixer, items, wanted, world)]
    except torch.OutOfMemoryError as e:
        size = options.batch_size
        raise OptionError(f"out of memory with batches of {size}: lower --batch-size; what is decoded is kept") from e
    finally:
        world.leave()
    if not world.main:
        return None
    results = summarize_all(options, models, scorer, hypotheses, wanted)
    tables.write_results(results, Path(options.out), options.plots)
    return results


def _bank(sources: Sequence[str], option: str, trim_silence: bool) -> NoiseBank | None:
    if not sources:
        return None
    try:
        bank = NoiseBank.from_manifest(list(sources), trim_silence=trim_silence)
    except DataError as e:
        raise DataError(f"{option}: {e}; name a folder or manifest of audio files") from e
    for name, _ in bank.skipped[:1]:
        warnings.warn(f"{option}: unreadable recordings left out: {len(bank.skipped)}, such as {name}", stacklevel=2)
    return bank


def write_mixtures(folder: Path, mixer: Mixer, items: Sequence[EvaluationItem], wanted: Sequence[Condition]) -> None:
    """FOLDER/CONDITION/UTTERANCE.wav, to listen to."""
    for condition in wanted:
        for item in items:
            name = item.id.replace("/", "_").replace("#", "_")
            write_wav(folder / condition.name / f"{name}.wav", mixer(item, condition).audio[0].numpy())


def summarize_all(
    options: EvaluateOptions,
    models: Sequence[ModelSpec],
    scorer: Scorer,
    hypotheses: Sequence[Hypothesis],
    wanted: Sequence[Condition],
) -> tables.Results:
    scored = [scorer.score_one(h) for h in hypotheses]
    by_name = {c.name: c for c in wanted}
    gates = []
    for spec in models:
        readings = [(by_name[h.condition], h.gates) for h in hypotheses if h.model == spec.label and h.gates]
        if readings:
            gates.append(summarize(spec.label, readings))
    return tables.Results(
        options=asdict(options),
        models={spec.label: spec.spec for spec in models},
        conditions=list(wanted),
        scores=scorer.scores(scored),
        comparisons=scorer.compare(scored),
        gates=gates,
        scored=scored,
    )


# ---- one model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch: utterances of one language under one condition, all within a window or one that is longer."""

    condition: Condition
    items: list[EvaluationItem]
    language: str | None


def plan_batches(
    items: Sequence[EvaluationItem], wanted: Sequence[Condition], detect: bool, batch_size: int
) -> list[Batch]:
    """The batches of a model, of utterances of like length. They depend on nothing that is done already.

    detect: the model is not told the language.
    """
    planned = []
    groups: dict[tuple[str | None, bool], list[EvaluationItem]] = {}
    for item in sorted(items, key=lambda item: (-item.seconds, item.id)):
        long = item.seconds > N_SAMPLES / SAMPLE_RATE
        groups.setdefault((_language(item, detect), long), []).append(item)
    for condition in wanted:
        for (code, long), group in groups.items():
            size = 1 if long else batch_size
            planned += [Batch(condition, group[i : i + size], code) for i in range(0, len(group), size)]
    return planned


def _language(item: EvaluationItem, detect: bool) -> str | None:
    """What the model is told; None, to detect it, also for what Whisper has no token for."""
    code = item.utterance.language
    return code if code in LANGUAGES and not detect else None


def _evaluate(
    spec: ModelSpec,
    options: EvaluateOptions,
    mixer: Mixer,
    items: Sequence[EvaluationItem],
    wanted: Sequence[Condition],
    world: World,
) -> list[Hypothesis]:
    """A model's hypotheses, those of earlier runs included, in the order of the plan; on the first rank alone."""
    dtype = options.dtype or ("fp16" if world.device.type == "cuda" else "fp32")
    decoding = Decoding(options.beam_size, options.fallback, dtype, options.rerank)
    keys = Keys(spec, decoding, options, mixer)
    done = {h.key: replace(h, model=spec.label) for h in read_hypotheses(Path(options.out))}
    batches = plan_batches(items, wanted, options.language == "auto", options.batch_size)
    mine = batches[world.rank :: world.size]
    missing = [batch for batch in (_missing(batch, keys, done) for batch in mine) if batch.items]
    if missing:
        recognize = recognizers.load_recognizer(spec, decoding, world.device, options.seed)
        recognize([np.zeros(SAMPLE_RATE, np.float32)], "en")  # so that the first batch is not timed with its start-up
        total = sum(len(batch.items) for batch in missing)
        with (
            Appender(Path(options.out), world) as file,
            tqdm(total=total, desc=spec.label, unit="utt", disable=not world.main, dynamic_ncols=True) as bar,
        ):
            for batch, mixtures in _mixed(missing, mixer, world.device):
                rows = _decode(recognize, spec, batch, mixtures, keys, options.gates)
                file.append(rows)
                done |= {h.key: h for h in rows}
                bar.update(len(rows))
        del recognize
    shares = world.gather([done[key] for batch in mine for key in keys.of(batch)])  # the ranks may share no disk
    done = {h.key: h for share in shares for h in share}
    return [done[key] for batch in batches for key in keys.of(batch)] if world.main else []


def _missing(batch: Batch, keys: Keys, done: dict[str, Hypothesis]) -> Batch:
    return replace(batch, items=[item for item, key in zip(batch.items, keys.of(batch)) if key not in done])


def _mixed(batches: Sequence[Batch], mixer: Mixer, device: torch.device) -> Iterator[tuple[Batch, list[Mixture]]]:
    """Batches with their mixtures, which are made while a GPU decodes the batch before.

    On a CPU they are made in between: beside other threads that compute in parallel OpenMP lets the model's ones sleep
    between two operations, which makes decoding on two cores 1.1 to 1.2 times as long.
    """
    if device.type == "cpu":
        for batch in batches:
            yield batch, [mixer(item, batch.condition) for item in batch.items]
        return
    with ThreadPoolExecutor(4) as pool:

        def start(batch: Batch) -> list[Future[Mixture]]:
            return [pool.submit(mixer, item, batch.condition) for item in batch.items]

        coming = start(batches[0])
        for i, batch in enumerate(batches):
            mixtures = [future.result() for future in coming]
            if i + 1 < len(batches):
                coming = start(batches[i + 1])
            yield batch, mixtures


def _decode(
    recognize: Recognizer, spec: ModelSpec, batch: Batch, mixtures: Sequence[Mixture], keys: Keys, gates: bool
) -> list[Hypothesis]:
    audio = [m.audio[0].numpy() for m in mixtures]
    start = time.perf_counter()
    texts = recognize(audio, batch.language)
    latency = time.perf_counter() - start
    readings: Sequence[GateReading | None] = [None] * len(texts)
    readable = (
        gates and not spec.front_end.enhancer and max(map(len, audio)) <= N_SAMPLES
    )  # they are read of mixtures as they are
    if readable and isinstance(recognize, Ours) and recognize.model.dual:
        readings = read_gates(recognize.model, mel_batch(recognize.model, audio), texts, mixtures, batch.language)
    return [
        Hypothesis(
            key=key,
            model=spec.label,
            condition=batch.condition.name,
            utterance=item.id,
            text=text,
            seconds=len(x) / SAMPLE_RATE,
            latency=latency,
            cost=latency / len(texts),
            gates=reading,
        )
        for item, key, text, x, reading in zip(batch.items, keys.of(batch), texts, audio, readings)
    ]


# ---- resuming -----------------------------------------------------------------------------------------------------


class Keys:
    """What a hypothesis depends on, as a short name: the model's weights, how it decodes, and the mixture."""

    def __init__(self, spec: ModelSpec, decoding: Decoding, options: EvaluateOptions, mixer: Mixer):
        self.common = [spec.fingerprint(), str(decoding), str(options.gates)]
        self.common += [str(spec.front_end)] if spec.front_end.enhancer else []
        self.detect = options.language == "auto"
        self.sources = {kind: mixer.signature(kind) for kind in options.kinds}

    def of(self, batch: Batch) -> list[str]:
        return [self._one(item, batch.condition) for item in batch.items]

    def _one(self, item: EvaluationItem, condition: Condition) -> str:
        size = Path(item.utterance.audio).stat().st_size  # another recording under the same name
        parts = [*self.common, str(_language(item, self.detect)), item.id, str(size), condition.name]
        return _digest([*parts, self.sources[condition.kind]])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()


def read_hypotheses(folder: Path) -> list[Hypothesis]:
    """All that earlier runs left in the folder."""
    found = []
    for path in sorted(folder.glob("hypotheses*.jsonl")):
        for row in json_lines(path):
            try:
                gates = row.pop("gates")
                found.append(Hypothesis(**row, gates=GateReading(**gates) if gates else None))
            except (TypeError, KeyError, AttributeError):  # of another version
                continue
    return found


class Appender:
    """Appends hypotheses to this rank's file, each batch at once on the disk."""

    def __init__(self, folder: Path, world: World):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ("hypotheses.jsonl" if world.size == 1 else f"hypotheses.{world.rank}.jsonl")

    def __enter__(self) -> Appender:
        self.file = self.path.open("a", encoding="utf-8")
        if self.file.tell():
            self.file.write("\n")  # closes a line that was cut off; empty lines are skipped
        return self

    def append(self, rows: Sequence[Hypothesis]) -> None:
        self.file.writelines(json.dumps(asdict(h), ensure_ascii=False) + "\n" for h in rows)
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()
