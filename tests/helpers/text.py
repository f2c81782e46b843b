"""What a model has heard, beside what was said."""

from __future__ import annotations

import re

from dawhisper.evaluation.metrics import count_words

SPEECH = "modern printers understand this but it is only practiced in the very best establishments"
"""What is said in assets/speech.opus."""


def words_in(text: str) -> str:
    """Lower case, without punctuation."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def wrong_words(text: str, said: str = SPEECH) -> int:
    """Substituted, lost and added words. Real models hear a word or two differently on other processors and from other
    pieces of sound, so tests allow a few; whatever is lost or said twice costs as many as it has words."""
    return count_words(said, words_in(text)).errors
