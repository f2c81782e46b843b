"""From a folder of files to a folder of subtitles, as a user would run it: dawhisper beside transformers' pipeline.

    python benchmarks/end_to_end.py MANIFEST --count 1000 --seconds 36 --model base.pt --batch_size 64
    python benchmarks/end_to_end.py MANIFEST --count 1 --seconds 36000 --model base.pt --batch_size 64 --device cuda:0
    python benchmarks/end_to_end.py MANIFEST ... --without_peer --sample

Makes the files from the clips of a manifest, one after the other with pauses between them; they stay in --folder for
the next run. Each package has a process of its own, from its start to its last file: imports, loading, decoding of
files (by PyAV for both), text, subtitles. Both decode greedily. Printed are times real time, from the start and from
the loaded model on; of dawhisper on one device, how much of the time the model waited for audio; and the GPU's
utilisation, as nvidia-smi tells it every half second, from the loaded model on. --sample prints where the time of the
thread went that runs the model, by function and line (sampler.py); where it waits for the GPU is a line too.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from sampler import Sampler

import dawhisper
from dawhisper.audio import SAMPLE_RATE, load_audio, to_int16
from dawhisper.data.manifest import encode_audio
from dawhisper.data.processes import in_processes
from dawhisper.files import replacing

PAUSE = 0.5  # seconds between two clips
PART = 1200.0  # seconds of a long file that are encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="JSONL manifest of speech, a folder with one, or a shard")
    parser.add_argument("--count", type=int, default=8, help="files")
    parser.add_argument("--seconds", type=float, default=36.0, help="of each file")
    parser.add_argument("--codec", choices=["opus", "flac"], default="opus", help="of the files")
    parser.add_argument("--folder", default="/tmp/dawhisper-end-to-end", help="for the files and the subtitles")
    parser.add_argument("--model", default="base", help="a stock one: both packages run it")
    parser.add_argument("--device", default=None, help="cpu, cuda:0, or for dawhisper alone cuda:0,cuda:1 or all")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default=None)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--language", default="en")
    parser.add_argument("--without_peer", action="store_true")
    parser.add_argument("--sample", action="store_true", help="where the model's thread spends its time, on one device")
    args = parser.parse_args()
    if args.sample and (args.device == "all" or "," in (args.device or "")):
        parser.error("--sample looks at this process: name one --device")

    files = make_files(args)
    hours = args.count * args.seconds / 3600
    print(f"{len(files)} files of {args.seconds:g} s, {hours:.3f} h, {args.codec}; batches of {args.batch_size}\n")
    print(
        "| package | seconds | times real time | without loading | waited for audio | GPU |\n|---|---|---|---|---|---|"
    )
    runs: dict[str, Callable[..., None]] = {"dawhisper": run_ours}
    sampled = ""
    if not args.without_peer:
        runs["transformers"] = run_transformers
    for name, function in runs.items():
        result = measured(function, args, files)
        loaded = result["seconds"] - result["loading"]
        waited = f"{100 * result['waited'] / loaded:.1f}%" if "waited" in result else "-"
        busy = "-" if result["gpu"] is None else f"{result['gpu']:.0f}%"
        speed = f"{3600 * hours / result['seconds']:.1f} | {3600 * hours / loaded:.1f}"
        print(f"| {name} | {result['seconds']:.1f} | {speed} | {waited} | {busy} |", flush=True)
        sampled = result.get("sampled", sampled)
    print(sampled)


def make_files(args: argparse.Namespace) -> list[Path]:
    """Files of this length from the manifest's clips, each from another clip on, by as many processes as there are
    cores; a long one in Opus, which is encoded at 80 times real time, holds its first part again and again."""
    folder = Path(args.folder) / f"{args.codec}-{args.count}x{args.seconds:g}"
    files = [folder / f"{number:05d}.{args.codec}" for number in range(args.count)]
    missing = [(number, file) for number, file in enumerate(files) if not file.is_file()]
    if missing:
        from dawhisper.tools.bench import load_clips

        clips = [clip.audio for clip in load_clips([args.manifest], 500)]
        folder.mkdir(parents=True, exist_ok=True)
        share = math.ceil(len(missing) / (os.cpu_count() or 1))  # the clips go to a process with each chunk: once
        for _ in in_processes(partial(write_file, clips, args.seconds), missing, chunk=share):
            pass
    return files


def write_file(clips: list[np.ndarray], seconds: float, job: tuple[int, Path]) -> None:
    number, file = job
    times = math.ceil(seconds / PART) if file.suffix == ".opus" else 1
    size, pause = round(seconds / times * SAMPLE_RATE), np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)
    parts, length, place = [], 0, number
    while length < size:
        parts += [clips[place % len(clips)], pause]
        length += len(parts[-2]) + len(pause)
        place += 1
    encoded = encode_audio(to_int16(np.concatenate(parts)[:size]), file.suffix[1:])
    with replacing(file) as part:
        part.write_bytes(encoded if times == 1 else repeated(encoded, times))


def repeated(encoded: bytes, times: int) -> bytes:
    """An encoded recording so many times in a row, packet by packet; the last one, which is padded, is left out."""
    import av

    made = io.BytesIO()
    with av.open(io.BytesIO(encoded)) as source, av.open(made, "w", format=source.format.name) as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        packets = [packet for packet in source.demux(audio=0) if packet.size][:-1]
        length = sum(packet.duration or 0 for packet in packets)
        for turn in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.duration = stream, packet.time_base, packet.duration
                copy.pts = copy.dts = (packet.pts or 0) + turn * length
                target.mux(copy)
    return made.getvalue()


def measured(function: Callable[..., None], args: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """What a run tells of itself, its seconds, and the GPU's utilisation in percent from the loaded model on."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    out = Path(args.folder) / function.__name__
    shutil.rmtree(out, ignore_errors=True)
    started = time.time()
    process = spawn.Process(target=function, args=(args, files, out, there))
    process.start()
    there.close()
    told: dict[str, Any] = {}
    done, seen = Event(), list[tuple[float, float]]()
    watch = Thread(target=watch_gpu, args=(done, seen))
    watch.start()
    with suppress(EOFError):
        while True:
            told |= here.recv()
    process.join()
    done.set()
    watch.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")
    missing = [file.name for file in files if not (out / f"{file.stem}.srt").is_file()]
    if missing:
        sys.exit(f"{function.__name__} wrote no subtitles for {missing[0]}, and {len(missing) - 1} more")
    loading = told.pop("loaded") - started
    busy = [percent for at, percent in seen if at > started + loading]
    gpu = sum(busy) / len(busy) if busy else None
    return {**told, "seconds": told.pop("ended") - started, "loading": loading, "gpu": gpu}


def watch_gpu(done: Event, seen: list[tuple[float, float]]) -> None:
    """The mean utilisation of all GPUs, every half second; nothing where there is no nvidia-smi."""
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    while shutil.which("nvidia-smi") and not done.wait(0.5):
        answer = subprocess.run(ask, capture_output=True, text=True).stdout.split()
        if answer:
            seen.append((time.time(), sum(map(float, answer)) / len(answer)))


# ---- in a process of its own --------------------------------------------------------------------------------------


def run_ours(args: argparse.Namespace, files: list[Path], out: Path, told: Any) -> None:
    """`dawhisper transcribe FOLDER`, with a watch beside the two things that it does in turn."""
    from dawhisper import batched, transcribe_files
    from dawhisper.cli import main as command

    waited = 0.0
    next_batch, load = batched.next_batch, transcribe_files.load_model

    def timed(*given: Any) -> Any:
        nonlocal waited
        before = time.perf_counter()
        made = next_batch(*given)
        waited += time.perf_counter() - before
        return made

    sampler = Sampler(Path(dawhisper.__file__).parent)

    def loading(*given: Any) -> Any:
        model = load(*given)
        told.send({"loaded": time.time()})
        if args.sample:
            sampler.start()
        return model

    batched.next_batch, transcribe_files.load_model = timed, loading
    several = args.device == "all" or "," in (args.device or "")
    if several:  # the models are loaded elsewhere
        told.send({"loaded": time.time()})
    words = ["transcribe", str(files[0].parent), "--model", args.model, "--batch_size", str(args.batch_size)]
    words += ["--beam_size", "None", "--temperature_increment_on_fallback", "None", "--language", args.language]
    words += ["-f", "srt", "-o", str(out), "--verbose", "None"]
    words += [
        word for name in ("device", "dtype") if getattr(args, name) for word in (f"--{name}", getattr(args, name))
    ]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 (its summary)
    code = command(words)
    told.send({"ended": time.time()} | ({} if several else {"waited": waited}))
    if args.sample:
        sampler.stop()
        told.send({"sampled": sampler.table()})
    sys.exit(code)


def run_transformers(args: argparse.Namespace, files: list[Path], out: Path, told: Any) -> None:
    """The pipeline of automatic speech recognition on the same files, in chunks of 30 s, and srt from its chunks."""
    import torch

    from dawhisper.evaluation.recognizers import ModelSpec
    from dawhisper.formats.huggingface import hide_broken_torchaudio
    from dawhisper.tools.bench import BenchOptions, converted
    from dawhisper.writers import WRITERS

    hide_broken_torchaudio()
    from transformers import pipeline

    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if device == "all" or "," in device:
        device = "cuda:0"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
        args.dtype or ("fp32" if device == "cpu" else "fp16")
    ]
    folder = converted(ModelSpec("", "hf", args.model), BenchOptions(recordings=(), model=args.model))
    recognise = pipeline(
        "automatic-speech-recognition",
        str(folder),
        device=device,
        dtype=dtype,
        chunk_length_s=30,
        batch_size=args.batch_size,
    )
    out.mkdir(parents=True)
    told.send({"loaded": time.time()})
    recognise.tokenizer.pad_token_id = recognise.model.config.eos_token_id  # batches need one
    multilingual = recognise.model.generation_config.is_multilingual
    asked = {"language": args.language, "task": "transcribe"} if multilingual else {}

    def sounds() -> Iterator[dict[str, Any]]:  # of a file's name the pipeline would ask the ffmpeg command
        yield from ({"raw": load_audio(file), "sampling_rate": SAMPLE_RATE} for file in files)

    for file, heard in zip(files, recognise(sounds(), return_timestamps=True, generate_kwargs=asked)):
        segments = [
            {"start": chunk["timestamp"][0] or 0.0, "end": chunk["timestamp"][1] or args.seconds, "text": chunk["text"]}
            for chunk in heard["chunks"]
        ]
        WRITERS["srt"](str(out))({"segments": segments}, str(file), {})
    told.send({"ended": time.time()})


if __name__ == "__main__":
    main()
