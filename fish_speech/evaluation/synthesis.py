"""What is spoken by whom: candidates, lines, and takes, each made once however often one stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fish_speech.audio import save_audio
from fish_speech.files import file_digest, read_json, write_json
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.text import is_speakable


@dataclass(frozen=True)
class Candidate:
    """A model to be measured. `load` gives it (raises `ValueError` or `OSError` where it can't be
    had), `digest` changes with its weights; `step` is None for what is no checkpoint."""

    name: str
    path: Path
    digest: str
    load: Callable[[], TextToSpeech]
    step: int | None = None


@dataclass(frozen=True)
class Recording:
    """A real clip and its words."""

    audio: Path
    text: str


@dataclass(frozen=True)
class Line:
    """A text to be spoken by every candidate, with a `reference` in front or without one.

    `speaker` names the voice of a model that has several, `voice` whose recordings it is compared
    with; `recording` is the real clip of the same text.
    """

    name: str
    text: str
    seed: int = 0
    speaker: str | None = None
    voice: str = ""
    reference: Recording | None = None
    recording: Recording | None = None


@dataclass(frozen=True)
class Take:
    """What came of a line: a file (None where nothing was said), and whether it ran on."""

    audio: Path | None
    runaway: bool


def plan_lines(
    texts: Sequence[Line], count: int, references: dict[str, Recording], seed: int = 0
) -> list[Line]:
    """`count` lines in all, each without and, where its voice has one, with a reference.

    With more `texts` than that, they are chosen evenly; with fewer, they are spoken again with the
    next seed. Raises `ValueError` where no text has a word.
    """
    texts = [line for line in texts if is_speakable(line.text)]
    if not texts:
        raise ValueError("no text to speak: none has a letter or a number")
    lines = []
    for index in range(count):
        place = index * len(texts) // count if len(texts) > count else index % len(texts)
        again = 0 if len(texts) > count else index // len(texts)
        line = replace(texts[place], name=f"{index + 1:04d}", seed=seed + again)
        lines.append(line)
        if line.voice in references:
            reference = references[line.voice]
            lines.append(replace(line, name=f"{line.name}-reference", reference=reference))
    return lines


def take(
    line: Line, candidate: Candidate, voice: Callable[[], TextToSpeech], settings: Settings,
    folder: Path,
) -> Take:  # fmt: skip
    """Speak a line at the first try, or find that it was spoken before, in `folder`.

    `voice` is only asked for the model where it is needed.
    """
    reference = line.reference and [file_digest(line.reference.audio), line.reference.text]
    settings = replace(settings, seed=line.seed, retries=0)
    made_of = [candidate.digest, line.text, line.speaker, reference, asdict(settings)]
    audio = folder / f"{line.name}.wav"

    def speak() -> dict[str, Any]:
        waveform, sample_rate, runaway = _speak(voice(), line, settings)
        if waveform is not None:
            save_audio(audio, waveform, sample_rate)
        return {"runaway": runaway, "empty": waveform is None}

    known = remembered(
        audio.with_suffix(".json"), made_of, speak,
        still_there=lambda found: found["empty"] or audio.is_file(),
    )  # fmt: skip
    return Take(None if known["empty"] else audio, known["runaway"])


def remembered(
    file: Path,
    made_of: Any,
    make: Callable[[], dict[str, Any]],
    still_there: Callable[[dict[str, Any]], bool] = lambda found: True,
) -> dict[str, Any]:
    """What `make` gives, from `file` where it was made of the same things before."""
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    try:
        found = read_json(file)
        if found["key"] == key and still_there(found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there, or nothing of ours: it is made again
    found = {"key": key, **make()}
    write_json(file, found)
    return found


def _speak(
    voice: TextToSpeech, line: Line, settings: Settings
) -> tuple[torch.Tensor | None, int, bool]:
    """The waveform [1, N] (None if the model said nothing), its rate, and whether it ran on."""
    reference = line.reference and voice.encode_reference(line.reference.audio, line.reference.text)
    waveforms, frames, ended, runaway = [], 0, False, False
    try:
        for piece in voice.pieces(line.text, reference, line.speaker, settings):
            waveforms.append(piece.waveform)
            frames += piece.frames
            ended, runaway = ended or piece.ends_chunk, runaway or piece.ran_on
    except ValueError:
        if frames or not ended:  # it did not even begin: the reference leaves no room, say
            raise
    waveform = torch.cat(waveforms, dim=1) if frames else None
    return waveform, voice.sample_rate, runaway
