"""What hotwords find and harm, by strength: names, or the rare words of a test set, as the terms of all its clips.

python benchmarks/hotwords.py dev_l2 --noise noise_amb_dev --snr 0 --limit 40
python benchmarks/hotwords.py test_libri --noise noise_amb_test --snr 0 --limit 60 --terms names.txt

A clip holds one of the terms or two, so the others distract it. For each strength (0: none): how many of the terms
that were spoken are written, how many are written that were not spoken, and the word errors of all other words.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace

from dawhisper import load_model
from dawhisper.decoding import DecodingOptions
from dawhisper.evaluation import metrics
from dawhisper.evaluation.conditions import Condition, Mixer, read_items
from dawhisper.hotwords import read_terms
from dawhisper.noise.recordings import NoiseBank
from dawhisper.window import decode_clips

SHORTEST = 6  # letters of a word that is a term
TOGETHER = 10  # clips decoded at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--noise", required=True)
    parser.add_argument("--snr", type=float, help="dB; clean without it")
    parser.add_argument("--model", default="dawhisper-base")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--beam_size", type=int, default=5, help="0 decodes greedily")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.0, 1.0, 2.0, 3.0])
    parser.add_argument("--limit", type=int, default=40, help="clips")
    parser.add_argument("--terms", help="single words between commas, or a file; words that occur once without it")
    parser.add_argument("--without_terms", action="store_true", help="clips without a term, to see the harm alone")
    args = parser.parse_args()

    normalize = metrics.normalizer("english", "en")
    items = read_items([args.manifest], "en")[0]
    words = {item.id: normalize(item.utterance.text or "").split() for item in items}
    seen = Counter(word for each in words.values() for word in each)
    rare = [word for word, count in seen.items() if count == 1 and len(word) >= SHORTEST]
    hotwords = list(read_terms(args.terms)) or sorted(rare)
    terms = {normalize(word) for word in hotwords}
    items = [item for item in items if bool(terms & set(words[item.id])) != args.without_terms]
    items = sorted(items, key=lambda item: item.seconds)[: args.limit]
    mixer = Mixer(items, noises=NoiseBank.from_manifest([args.noise]))
    condition = Condition("clean") if args.snr is None else Condition("real", args.snr)
    clips = [mixer(item, condition).audio[0].numpy() for item in items]
    model = load_model(args.model, dtype=args.dtype)
    beams = args.beam_size or None
    options = DecodingOptions(language="en", without_timestamps=True, beam_size=beams, hotwords=hotwords)
    print(f"{len(clips)} clips, {condition.name}, {len(terms)} terms, {args.model}, beams: {args.beam_size}")
    for strength in args.strength:
        start, found, spoken, invented = time.process_time(), 0, 0, 0
        wrong = total = 0
        for first in range(0, len(clips), TOGETHER):
            asked = replace(options, hotword_strength=strength)
            for item, result in zip(items[first:], decode_clips(model, clips[first : first + TOGETHER], asked)):
                heard = normalize(result.text).split()
                wanted, got = (Counter(w for w in each if w in terms) for each in (words[item.id], heard))
                found, spoken = found + (wanted & got).total(), spoken + wanted.total()
                invented += (got - wanted).total()
                rest = [" ".join(w for w in each if w not in terms) for each in (words[item.id], heard)]
                counts = metrics.count_words(*rest)
                wrong, total = wrong + counts.errors, total + counts.reference
        seconds = time.process_time() - start
        print(
            f"strength {strength:g}: {found} of {spoken} terms, {invented} that were not said, "
            f"other words {wrong} of {total} wrong, {seconds:.1f} s of CPU time",
            flush=True,
        )


if __name__ == "__main__":
    main()
