"""Test sets that others report on, read where they lie on disk as they are handed out: `dawhisper evaluate --protocol`.

librispeech-musan: LibriSpeech's test sets with MUSAN's noise mixed in at 10, 5, 0 and -5 dB, and noise alone.
voicebank-demand: the clean and the noisy test files of VoiceBank-DEMAND (Valentini-Botinhao 2017), as recorded.
chime4: the one-channel track of CHiME-4, dt05 and et05, real and simulated, as recorded.
ami-sdm: AMI's test meetings (Kaldi's split) by the first distant microphone, cut at the annotated segments.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dawhisper.data.manifest import Report, Utterance
from dawhisper.data.releases import SOURCE_FORMATS, Source
from dawhisper.errors import DataError, near_names, one_line

AMI_TEST = ("ES2004", "IS1009", "TS3003", "EN2002")  # meetings a to d of each
NITE = "{http://nite.sourceforge.net/}"
WORD_RANGE = re.compile(r"#id\(([^)]*)\)(?:\.\.id\(([^)]*)\))?")


@dataclass(frozen=True)
class Protocol:
    """read: a corpus folder -> its utterances, whose `source` names the parts that are told apart in the results.

    kinds, snrs: the conditions; layout: what the folder is to hold, for whoever has another one.
    """

    read: Callable[[Path], Iterator[Utterance]]
    kinds: tuple[str, ...]
    snrs: tuple[float, ...]
    layout: str


def utterances_of(name: str, folder: Path) -> list[Utterance]:
    """The protocol's utterances in a corpus folder. DataError where the folder is laid out otherwise."""
    protocol = PROTOCOLS[name]
    if not folder.is_dir():
        raise DataError(f"--protocol {name} takes the corpus' folder; {folder} is none")
    try:
        found = list(protocol.read(folder))
    except (OSError, ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {folder} for --protocol {name}: {one_line(error)}") from error
    if not found:
        raise DataError(f"{folder} has nothing for --protocol {name}, which expects {protocol.layout}")
    return found


def known_protocol(name: str) -> Protocol:
    """DataError with a hint for a name that is none."""
    if name not in PROTOCOLS:
        raise DataError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}{near_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def librispeech(folder: Path) -> Iterator[Utterance]:
    source = Source(str(folder), "librispeech", "speech", "en", encoding=None, out=folder)
    utterances = [item.utterance for item in SOURCE_FORMATS["librispeech"](source, Report())]
    tests = [u for u in utterances if (u.source or "").startswith("test-")]
    yield from tests or utterances


def voicebank_demand(folder: Path) -> Iterator[Utterance]:
    for part in ("clean", "noisy"):
        for audio in sorted(folder.glob(f"{part}_testset_wav*/**/*.wav")):
            texts = sorted(folder.glob(f"testset_txt/**/{audio.stem}.txt"))
            if not texts:
                raise DataError(f"{folder}/testset_txt has no {audio.stem}.txt for {audio.name}")
            text = " ".join(texts[0].read_text("utf-8").split())
            speaker = audio.stem.split("_")[0]
            yield Utterance(str(audio), text, language="en", speaker=speaker, source=part)


def chime4(folder: Path) -> Iterator[Utterance]:
    texts: dict[str, str] = {}
    for path in sorted(folder.rglob("*.trn*")):  # of one utterance, or .trn_all of a part
        for line in path.read_text("utf-8").splitlines():
            name, _, text = line.strip().partition(" ")
            texts[name] = text
    for audio in sorted(folder.glob("**/isolated_1ch_track/*/*.wav")):
        place = re.fullmatch(r"(dt05|et05)_\w+_(real|simu)", audio.parent.name)
        if place is None:
            continue
        name = audio.stem.split(".")[0]  # without .CH5
        if name not in texts:
            raise DataError(f"{folder} has no text of {audio.parent.name}/{audio.name} in a .trn or .trn_all")
        speaker = name.split("_")[0]
        yield Utterance(str(audio), texts[name], language="en", speaker=speaker, source=f"{place[1]}_{place[2]}")


def ami_sdm(folder: Path) -> Iterator[Utterance]:
    for audio in sorted(folder.rglob("*.Array1-01.wav")):
        meeting = audio.name.split(".")[0]
        if not meeting.startswith(AMI_TEST):
            continue
        for segments in sorted(folder.rglob(f"segments/{meeting}.*.segments.xml")):
            channel = segments.name.split(".")[1]
            words = segments.parent.parent / "words" / f"{meeting}.{channel}.words.xml"
            yield from ami_segments(audio, segments, words, f"{meeting}.{channel}")


def ami_segments(audio: Path, segments: Path, words: Path, speaker: str) -> Iterator[Utterance]:
    """One participant's segments that hold words, of NXT's stand-off annotation; punctuation is none."""
    spoken = list(ElementTree.parse(words).getroot())
    place = {word.get(f"{NITE}id"): i for i, word in enumerate(spoken)}
    for segment in ElementTree.parse(segments).getroot():
        said: list[str] = []
        for child in segment.iter(f"{NITE}child"):
            match = WORD_RANGE.search(child.get("href", ""))
            if match is None or match[1] not in place:
                raise DataError(f"{segments} refers to {child.get('href')}, which {words.name} does not have")
            first, last = place[match[1]], place.get(match[2], place[match[1]])
            said += [w.text or "" for w in spoken[first : last + 1] if w.tag == "w" and w.get("punc") != "true"]
        start, end = (float(segment.get(f"transcriber_{edge}", "nan")) for edge in ("start", "end"))
        if any(said) and end > start:
            text = " ".join(word for word in said if word)
            duration = end - start
            yield Utterance(str(audio), text, duration, "en", speaker, start=start, end=end, source="ami-sdm")


PROTOCOLS = {
    "librispeech-musan": Protocol(
        librispeech,
        ("clean", "real", "noise-only"),
        (10.0, 5.0, 0.0, -5.0),
        "LibriSpeech's test-clean and test-other (SPEAKER/CHAPTER/*.trans.txt), and MUSAN's noise folder by --noise",
    ),
    "voicebank-demand": Protocol(
        voicebank_demand, ("recorded",), (), "clean_testset_wav, noisy_testset_wav and testset_txt"
    ),
    "chime4": Protocol(
        chime4,
        ("recorded",),
        (),
        "isolated_1ch_track/{dt05,et05}_*_{real,simu}/*.wav, and their .trn or .trn_all files",
    ),
    "ami-sdm": Protocol(
        ami_sdm, ("recorded",), (), "MEETING/audio/*.Array1-01.wav, and the annotation's segments/ and words/"
    ),
}
