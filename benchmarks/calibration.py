"""How often words of a given probability are right, and whether a logistic fit makes a better one of it.

    python benchmarks/calibration.py hear dev_en dev_l2 --limit 52 --noise noise_amb_dev --out dev.jsonl
    python benchmarks/calibration.py hear test_vctk test_libri --limit 40 --noise noise_amb_test --out test.jsonl
    python benchmarks/calibration.py judge test.jsonl --fit dev.jsonl

`hear` transcribes clips, clean, in real noise and in babble, and writes a line for each word: its probability, gate,
and its segment's no-speech probability, and whether the edit path to the reference says that it is right. `judge`
prints for each condition the share of right words and the expected calibration error: the mean distance, over ten bins
of probability, from a bin's mean probability to its share of right words, weighted by its words. AUC is how often a
right word has the higher probability of a right and a wrong one; it tells of the order alone. With --fit the same for
logistic regressions on the other file's words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dawhisper import Transcription, Whisper, load_model, transcribe
from dawhisper.edits import common
from dawhisper.evaluation.conditions import Condition, EvaluationItem, Mixer, read_items
from dawhisper.evaluation.metrics import normalizer
from dawhisper.files import json_lines
from dawhisper.noise.recordings import NoiseBank

CONDITIONS = [Condition("clean"), Condition("real", 5.0), Condition("real", 0.0), Condition("babble", 5.0)]
BINS = 10
# a word's own probability alone, and with what else is known of it
FITS = {"p": ["p"], "p, gate": ["p", "gate"], "p, gate, no-speech": ["p", "gate", "no_speech"]}


def hear(model: Whisper, items: list[EvaluationItem], mixer: Mixer, condition: Condition, batch: int) -> list[dict]:
    """The words of each clip, with what is known of them."""
    normalize = normalizer("english", "en")
    clips = [mixer(item, condition).audio[0].numpy() for item in items]
    heard = transcribe(model, clips, language="en", word_timestamps=True, batch_size=batch)
    rows = []
    for item, result in zip(items, heard):
        assert isinstance(result, Transcription)
        spoken = [(word, segment) for segment in result.segments for word in segment.words or ()]
        words = [(piece, word, segment) for word, segment in spoken for piece in normalize(word.word).split()]
        reference = normalize(item.utterance.text or "").split()
        right = {j for _, j in common(reference, [piece for piece, _, _ in words])}
        rows += [
            {
                "condition": condition.name,
                "word": piece,
                "right": j in right,
                "p": word.probability,
                "gate": word.gate,
                "no_speech": segment.no_speech_prob,
            }
            for j, (piece, word, segment) in enumerate(words)
        ]
    return rows


def features(rows: list[dict], names: list[str]) -> np.ndarray:
    """[n, 1 + len(names)]; probabilities as log odds, the gate as it is."""
    columns = [np.array([row[name] for row in rows], float) for name in names]
    return np.stack([np.ones(len(rows)), *(x if n == "gate" else log_odds(x) for n, x in zip(names, columns))], axis=1)


def log_odds(p: np.ndarray) -> np.ndarray:
    p = p.clip(1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def fit(x: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Coefficients of a logistic regression, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = sigmoid(x @ w)
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(w)), x.T @ (right - p) - 1e-3 * w)
    return w


def bins_of(p: np.ndarray) -> list[np.ndarray]:
    """Which probabilities [n] lie in each of ten bins."""
    places = (p * BINS).astype(int).clip(0, BINS - 1)
    return [places == b for b in range(BINS)]


def calibration_error(p: np.ndarray, right: np.ndarray) -> float:
    gaps = [abs((p - right)[some].sum()) for some in bins_of(p)]
    return float(sum(gaps) / len(p))


def auc(p: np.ndarray, right: np.ndarray) -> float:
    wrong, correct = p[~right], p[right]
    above = (correct[:, None] > wrong).mean() + (correct[:, None] == wrong).mean() / 2
    return float(above)


def judge(rows: list[dict], fitted_on: list[dict]) -> None:
    """Print what there is to say of the words, and where `fitted_on` has some of the fits on them."""
    right = np.array([row["right"] for row in rows])
    found = {"as it is": np.array([row["p"] for row in rows])}
    for name, names in FITS.items() if fitted_on else ():
        w = fit(features(fitted_on, names), np.array([row["right"] for row in fitted_on]))
        found[f"fit of {name} ({', '.join(f'{x:.2f}' for x in w)})"] = sigmoid(features(rows, names) @ w)
    where = np.array([row["condition"] for row in rows])
    for name, p in found.items():
        print(name)
        for condition in [*dict.fromkeys(where), "all"]:
            some = (where == condition) | (condition == "all")
            brier = np.square(p - right)[some].mean()
            print(
                f"  {condition}: {some.sum()} words, {100 * right[some].mean():.1f}% right, mean probability "
                f"{100 * p[some].mean():.1f}%, ECE {100 * calibration_error(p[some], right[some]):.1f}%, "
                f"Brier {brier:.3f}, AUC {auc(p[some], right[some]):.3f}"
            )
        shares = [f"{100 * right[some].mean():.0f} of {some.sum()}" for some in bins_of(p) if some.any()]
        print(f"  % right by tenths: {'; '.join(shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    hearing = commands.add_parser("hear")
    hearing.add_argument("manifests", nargs="+")
    hearing.add_argument("--noise", required=True)
    hearing.add_argument("--model", default="dawhisper-base")
    hearing.add_argument("--dtype", default="auto")
    hearing.add_argument("--limit", type=int, default=40, help="clips of each manifest, spread evenly")
    hearing.add_argument("--batch_size", type=int, default=8)
    hearing.add_argument("--out", type=Path, required=True)
    judging = commands.add_parser("judge")
    judging.add_argument("words", type=Path)
    judging.add_argument("--fit", type=Path, help="words that logistic regressions are fitted on")
    args = parser.parse_args()
    if args.command == "judge":
        judge(list(json_lines(args.words)), list(json_lines(args.fit)) if args.fit else [])
        return
    items = [
        some[i]
        for some in read_items(args.manifests, "en")
        for i in np.unique(np.linspace(0, len(some) - 1, min(args.limit, len(some))).round().astype(int))
    ]
    model, mixer = load_model(args.model, dtype=args.dtype), Mixer(items, noises=NoiseBank.from_manifest([args.noise]))
    with args.out.open("w") as out:
        for condition in CONDITIONS:
            for row in hear(model, items, mixer, condition, args.batch_size):
                out.write(json.dumps(row) + "\n")
            print(f"{condition.name}: {len(items)} clips", flush=True)


if __name__ == "__main__":
    main()
