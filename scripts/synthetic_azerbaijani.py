"""Synthetic Azerbaijani: sentences read by espeak-ng, as folders with manifests, to rehearse the recipe without speech.

    python scripts/synthetic_azerbaijani.py sentences.txt more.txt --out data

One sentence a line. Writes data/az_train, data/az_dev and data/az_test: Ogg Opus files (16 kHz, mono) beside a
manifest.jsonl. Neither the voices nor the sentences of dev and test are in train. A formant synthesiser sounds alike
in every clip and reads without fail: what a model learns here says that the path works, not how well it hears people.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dawhisper.audio import SAMPLE_RATE, load_audio, to_int16
from dawhisper.data.manifest import MAX_SECONDS, MIN_SECONDS
from dawhisper.data.prepare import encode_audio
from dawhisper.errors import DataError, DawhisperError

TRAIN_VOICES = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m8", "f1", "f2", "f3", "f4", "klatt2", "klatt4", "adam", "Alex", "Alicia"),
    *("Annie", "belinda", "benjamin", "caleb", "david", "Denis", "Diogo", "Hugo", "linda", "Marco", "Mario", "max"),
    *("Michael", "pablo", "steph", "victor"),
)
DEV_VOICES = ("Gene", "anika", "travis")
TEST_VOICES = ("m7", "f5", "Andrea", "Lee")
WORDS_PER_MINUTE = (130, 190)
PITCH = (30, 70)  # of espeak-ng's 0 to 99, around the voice's own
SIMILAR = 0.8  # difflib's ratio from which two sentences count as one


@dataclass(frozen=True)
class Reading:
    """One sentence, and how espeak-ng is to read it."""

    text: str
    voice: str  # a variant of espeak-ng's voice `az`
    words_per_minute: int
    pitch: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 files of Azerbaijani sentences, one a line")
    parser.add_argument("--out", required=True, type=Path, help="folder for az_train, az_dev and az_test")
    parser.add_argument("--dev", type=int, default=60, help="sentences of the dev set, read once each")
    parser.add_argument("--test", type=int, default=100, help="sentences of the test set, read once each")
    parser.add_argument("--voices-per-sentence", type=int, default=2, help="how often a training sentence is read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        check_voices((*TRAIN_VOICES, *DEV_VOICES, *TEST_VOICES))
        sentences = read_sentences(args.text)
        plan = plan_readings(sentences, args.dev, args.test, args.voices_per_sentence, random.Random(args.seed))
        for split, readings in plan.items():
            print(write_split(args.out / f"az_{split}", readings))
    except DawhisperError as error:
        print(f"synthetic_azerbaijani: error: {error}", file=sys.stderr)
        return 1
    return 0


def espeak(*arguments: str) -> str:
    """Run espeak-ng; what it prints. Raises DataError where it is missing or fails."""
    try:
        return subprocess.run(["espeak-ng", *arguments], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise DataError("espeak-ng is not installed: apt-get install espeak-ng, or see its project page") from None
    except subprocess.CalledProcessError as error:
        raise DataError(f"espeak-ng failed: {error.stderr.strip() or error}") from None


def check_voices(variants: tuple[str, ...]) -> None:
    """espeak-ng reads with another voice, without a word, where it does not know one."""
    listed = espeak("--voices=variant")
    missing = [v for v in variants if f"!v/{v} " not in listed]
    if missing or " az " not in espeak("--voices=az"):
        raise DataError(f"this espeak-ng lacks the voice az or its variants {', '.join(missing)}: take 1.51 or newer")


def read_sentences(files: list[Path]) -> list[str]:
    """The different lines of the files in their order, but for those with digits, which are spoken as other words."""
    lines: dict[str, None] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file}: {error}") from None
        lines |= dict.fromkeys(" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and not any(letter.isdigit() for letter in line)]


def plan_readings(
    sentences: list[str], n_dev: int, n_test: int, per_sentence: int, rng: random.Random
) -> dict[str, list[Reading]]:
    """Who reads what: dev and test are drawn first, and nothing much like them is left for train."""
    if len(sentences) <= n_dev + n_test:
        raise DataError(f"{len(sentences)} sentences are not enough for {n_dev} of dev, {n_test} of test and some more")
    shuffled = rng.sample(sentences, len(sentences))
    test, dev, rest = shuffled[:n_test], shuffled[n_test : n_test + n_dev], shuffled[n_test + n_dev :]
    train = [s for s in rest if not difflib.get_close_matches(s, test + dev, n=1, cutoff=SIMILAR)]
    return {
        "train": [_reading(s, v, rng) for s in train for v in rng.sample(TRAIN_VOICES, per_sentence)],
        "dev": [_reading(s, DEV_VOICES[i % len(DEV_VOICES)], rng) for i, s in enumerate(dev)],
        "test": [_reading(s, TEST_VOICES[i % len(TEST_VOICES)], rng) for i, s in enumerate(test)],
    }


def _reading(text: str, voice: str, rng: random.Random) -> Reading:
    return Reading(text, voice, rng.randint(*WORDS_PER_MINUTE), rng.randint(*PITCH))


def write_split(folder: Path, readings: list[Reading]) -> str:
    """Synthesise into the folder; one line that says what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(synthesise(folder, readings))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")
    hours = sum(float(str(line["duration"])) for line in lines) / 3600
    return f"{folder}: {len(lines)} of {len(readings)} clips, {hours:.2f} h"


def synthesise(folder: Path, readings: list[Reading]) -> Iterator[dict[str, object]]:
    """Write each reading's audio; its manifest line, where it is neither too short nor too long to train on."""
    with tempfile.TemporaryDirectory() as temporary:
        wav = Path(temporary) / "clip.wav"
        for number, r in enumerate(tqdm(readings, desc=folder.name, unit="clip", disable=None)):
            voice = ("-v", f"az+{r.voice}", "-s", str(r.words_per_minute), "-p", str(r.pitch))
            espeak(*voice, "-w", str(wav), "--", r.text)
            audio = to_int16(load_audio(wav))
            seconds = len(audio) / SAMPLE_RATE
            if not MIN_SECONDS <= seconds < MAX_SECONDS:
                continue
            name = f"{r.voice}-{number:04d}.opus"
            (folder / name).write_bytes(encode_audio(audio, "opus", 32000))
            yield {
                "audio": name,
                "text": r.text,
                "duration": round(seconds, 4),
                "language": "az",
                "speaker": f"espeak-{r.voice}",
                "source": "espeak-ng az",
            }


if __name__ == "__main__":
    sys.exit(main())
