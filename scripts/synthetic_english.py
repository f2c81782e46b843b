"""Synthetic English: sentences read by flite and SVOX Pico, as a folder with a manifest, for a student's many texts.

    python scripts/synthetic_english.py sentences.txt --out data/tts --sentences 40000
    dawhisper prepare data/tts/manifest.jsonl --label-with MODEL --out labelled/tts

One sentence a line. Each is read once, by a voice, at a rate and in a pitch drawn for it (`flite` and `pico2wave`, of
the Debian packages flite and libttspico-utils; one of them is enough), and written as FLAC, 16 kHz, mono. A hundred
sentences take a few seconds of a core. What it teaches is words, not how people sound.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dawhisper.audio import SAMPLE_RATE, load_audio, to_int16
from dawhisper.data.manifest import MAX_SECONDS, MIN_SECONDS, Utterance, write_manifest
from dawhisper.data.prepare import encode_audio
from dawhisper.data.processes import in_processes
from dawhisper.errors import DataError, DawhisperError

VOICES = (
    *(("flite", voice) for voice in ("slt", "rms", "awb", "kal16")),
    *(("pico2wave", voice) for voice in ("en-US", "en-GB")),
)
WEIGHTS = {"flite": 1, "pico2wave": 3}  # of each voice
WARP = (0.9, 1.12)  # resampled by this: pitch, formants and rate of somebody else
LEVEL = (0.2, 0.9)  # of full scale, at the loudest sample
QUIET = 0.006  # of full scale: what lies outside louder samples is cut off, but for a tenth of a second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 files of English sentences, one a line")
    parser.add_argument("--out", required=True, type=Path, help="folder for the clips and manifest.jsonl")
    parser.add_argument("--sentences", type=int, default=40000, help="how many to read, drawn from the files")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        voices = [(engine, voice) for engine, voice in VOICES if shutil.which(engine)]
        if not voices:
            raise DataError("neither flite nor pico2wave is installed: apt-get install flite, or libttspico-utils")
        sentences = read_sentences(args.text)
        chosen = random.Random(args.seed).sample(sentences, min(args.sentences, len(sentences)))
    except DawhisperError as error:
        print(f"synthetic_english: error: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    job = partial(read, voices, args.out, args.seed)
    jobs = in_processes(job, list(enumerate(chosen)), args.processes)
    made = list(tqdm(jobs, total=len(chosen), unit="clip", disable=None))
    clips = [u for u in made if u is not None]
    write_manifest(args.out / "manifest.jsonl", clips)
    print(f"{args.out}: {len(clips)} of {len(chosen)} clips, {sum(u.duration for u in clips) / 3600:.2f} h")
    return 0


def read_sentences(files: list[Path]) -> list[str]:
    """The different lines of the files, in their order."""
    lines: dict[str, None] = {}
    for file in files:
        try:
            lines |= dict.fromkeys(" ".join(x.split()) for x in file.read_text(encoding="utf-8-sig").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file}: {error}") from None
    return [line for line in lines if line]


def read(voices: list[tuple[str, str]], folder: Path, seed: int, sentence: tuple[int, str]) -> Utterance | None:
    """Write the clip of one numbered sentence; None where the engine fails or it can't be trained on."""
    number, text = sentence
    rng = random.Random(seed << 32 | number)
    engine, voice = rng.choices(voices, [WEIGHTS[engine] for engine, _ in voices])[0]
    with tempfile.TemporaryDirectory() as temporary:
        wav = Path(temporary) / "clip.wav"
        try:
            subprocess.run(command(engine, voice, text, wav, rng), check=True, capture_output=True, timeout=60)
            audio = load_audio(wav)
        except (subprocess.SubprocessError, OSError, DawhisperError):
            return None
    loud = np.flatnonzero(np.abs(audio) > QUIET)
    if len(loud) == 0:
        return None
    audio = audio[max(0, loud[0] - SAMPLE_RATE // 10) : loud[-1] + SAMPLE_RATE // 10]
    places = np.linspace(0, len(audio) - 1, int(len(audio) * rng.uniform(*WARP)))
    audio = np.interp(places, np.arange(len(audio)), audio)
    audio *= rng.uniform(*LEVEL) / np.abs(audio).max()
    seconds = len(audio) / SAMPLE_RATE
    if not MIN_SECONDS <= seconds < MAX_SECONDS:
        return None
    path = folder / f"{number:06d}.flac"
    path.write_bytes(encode_audio(to_int16(audio.astype(np.float32)), "flac"))
    return Utterance(str(path), text, seconds, "en", speaker=f"{engine}-{voice}", source=f"synthetic, {engine}")


def command(engine: str, voice: str, text: str, wav: Path, rng: random.Random) -> list[str]:
    if engine == "flite":
        stretch = f"duration_stretch={rng.uniform(0.85, 1.2):.2f}"
        return [engine, "-voice", voice, "--setf", stretch, "-t", text, "-o", str(wav)]
    marked = text.replace("&", "and").replace("<", " ").replace(">", " ")
    speed, pitch = rng.randint(85, 118), rng.randint(70, 130)
    spoken = f'<speed level="{speed}"><pitch level="{pitch}">{marked}</pitch></speed>'
    return [engine, "-l", voice, "-w", str(wav), spoken]


if __name__ == "__main__":
    sys.exit(main())
