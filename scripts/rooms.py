"""Made rooms: impulse responses of shoebox rooms by pyroomacoustics, as a folder with a manifest, for `data.rir`.

    python scripts/rooms.py --out data/rooms --count 360
    python scripts/rooms.py --out data/halls --count 120 --size 4 25 --reverberation 0.6 2.6 --seed 1
    python train.py configs/base_noise.yaml data.rir=[data/rooms,data/halls] ...

Each room has a size and a reverberation time drawn for it, walls that scatter, and two or three pairs of a speaker and
a microphone, whose responses are the image method's early reflections and ray tracing's late ones. They are written as
FLAC, 16 kHz, mono, from the direct sound to where 60 dB are gone. A room takes a second or so of a core.
(`pip install pyroomacoustics`.)
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dawhisper.audio import SAMPLE_RATE, to_int16
from dawhisper.data.manifest import Utterance, encode_audio, write_manifest
from dawhisper.data.processes import in_processes
from dawhisper.errors import DawhisperError, OptionError
from dawhisper.files import writable_folder

POSITIONS = (2, 3)  # pairs of a speaker and a microphone in a room
WIDTH = (0.5, 1.0)  # of the length
HEIGHT = (2.3, 3.2), 0.35  # metres; of a hall this share of its width, where that is more
WALL = 0.4  # metres from a wall to a speaker or microphone, at least
HEAD = (1.1, 1.9)  # metres from the floor to a mouth
TABLE = (0.5, 1.9)  # to a microphone
NEAR = 0.3  # metres from mouth to microphone, at least
SCATTER = (0.05, 0.4)  # share of the energy that walls scatter
IMAGES = 10  # order of the image method: what comes later is traced
RAYS = 8000
DECAY = 1e-6  # of the energy: the tail after it is cut off
LEAD = SAMPLE_RATE // 1000  # samples kept before the largest tap, which is mostly the direct sound
PEAK = 0.9  # of full scale
TRIES = 200  # sizes and times drawn until walls can be made for them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the responses and manifest.jsonl")
    parser.add_argument("--count", type=int, default=360, help="how many responses (default: 360)")
    for name, default, what in (
        ("--size", (2.5, 10.0), "length of a room in metres (default: 2.5 10)"),
        ("--reverberation", (0.15, 0.9), "seconds in which 60 dB are gone (default: 0.15 0.9)"),
    ):
        parser.add_argument(name, nargs=2, type=float, metavar=("MIN", "MAX"), default=default, help=what)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        import pyroomacoustics  # noqa: F401
    except ModuleNotFoundError:
        print("rooms: error: pyroomacoustics is not installed: pip install pyroomacoustics", file=sys.stderr)
        return 1
    try:
        for name, least in (("size", 2 * WALL + NEAR), ("reverberation", 0.05)):
            low, high = getattr(args, name)
            if not least <= low <= high:
                rule = f"two numbers from {least:g} on, the smaller one first"
                raise OptionError(f"--{name} is {rule}, not {low:g} {high:g}")
        if args.count < 1:
            raise OptionError("--count must be 1 or more")
        writable_folder(args.out)
        rooms = positions(args.count, args.seed)
        job = partial(room, args.out, args.size, args.reverberation, args.seed)
        jobs = in_processes(job, rooms, args.processes, chunk=1)
        made = [u for some in tqdm(jobs, total=len(rooms), unit="room", disable=None) for u in some]
        write_manifest(args.out / "manifest.jsonl", made)
    except DawhisperError as error:
        print(f"rooms: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(made)} responses of {len(rooms)} rooms, {sum(u.duration for u in made):.0f} s")
    return 0


def positions(count: int, seed: int) -> list[tuple[int, int]]:
    """Number of the first response of each room and how many it has, `count` of them together."""
    rng = np.random.default_rng(seed)
    rooms, first = [], 0
    while first < count:
        several = min(int(rng.integers(POSITIONS[0], POSITIONS[1] + 1)), count - first)
        rooms.append((first, several))
        first += several
    return rooms


def room(
    folder: Path, size: tuple[float, float], reverberation: tuple[float, float], seed: int, which: tuple[int, int]
) -> list[Utterance]:
    """Write the responses of one room."""
    import pyroomacoustics as pra

    first, several = which
    rng = np.random.default_rng([seed, first])
    pra.random.seed(int(rng.integers(2**31)))
    pra.constants.set("num_threads", 1)
    dimensions, seconds, absorption = draw(rng, size, reverberation)
    made = pra.ShoeBox(
        dimensions,
        fs=SAMPLE_RATE,
        materials=pra.Material(absorption, rng.uniform(*SCATTER)),
        max_order=IMAGES,
        ray_tracing=True,
        air_absorption=True,
    )
    made.set_ray_tracing(n_rays=RAYS, receiver_radius=0.3, energy_thres=1e-7, time_thres=reverberation[1] * 1.5)
    pairs = [pair(rng, dimensions) for _ in range(several)]
    for mouth, _ in pairs:
        made.add_source(mouth)
    made.add_microphone_array(np.array([microphone for _, microphone in pairs]).T)
    made.compute_rir()
    place = " x ".join(f"{d:.1f}" for d in dimensions)
    written = []
    for k in range(several):
        response = trimmed(made.rir[k][k])
        path = folder / f"{first + k:04d}.flac"
        path.write_bytes(encode_audio(to_int16(response), "flac"))
        written.append(
            Utterance(str(path), duration=len(response) / SAMPLE_RATE, source=f"made room, {place} m, {seconds:.2f} s")
        )
    return written


def draw(
    rng: np.random.Generator, size: tuple[float, float], reverberation: tuple[float, float]
) -> tuple[list[float], float, float]:
    """A room's three sizes in metres, its reverberation in seconds, and what its walls absorb for that."""
    import pyroomacoustics as pra

    for _ in range(TRIES):
        length, seconds = rng.uniform(*size), rng.uniform(*reverberation)
        width = max(length * rng.uniform(*WIDTH), 2 * WALL + NEAR)
        low, share = HEIGHT
        dimensions = [length, width, max(rng.uniform(*low), share * width)]
        try:
            absorption, _ = pra.inverse_sabine(seconds, dimensions)
        except ValueError:  # no walls absorb so much
            continue
        return dimensions, seconds, float(absorption)
    raise OptionError(f"no room of {size[0]:g} to {size[1]:g} m has {reverberation[0]:g} to {reverberation[1]:g} s")


def pair(rng: np.random.Generator, dimensions: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where somebody speaks and where the microphone stands."""
    length, width, height = dimensions
    while True:
        mouth, microphone = (
            np.array([rng.uniform(WALL, length - WALL), rng.uniform(WALL, width - WALL), rng.uniform(*level)])
            for level in (HEAD, TABLE)
        )
        if np.linalg.norm(mouth - microphone) >= NEAR and max(mouth[2], microphone[2]) < height - WALL:
            return mouth, microphone


def trimmed(response: np.ndarray) -> np.ndarray:
    """From the direct sound to where the energy that is still to come is 60 dB down, scaled."""
    response = response[max(0, int(np.abs(response).argmax()) - LEAD) :]
    to_come = np.square(response)[::-1].cumsum()[::-1]
    response = response[: max(1, int(np.count_nonzero(to_come > DECAY * to_come[0])))]
    return (response * (PEAK / np.abs(response).max())).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
