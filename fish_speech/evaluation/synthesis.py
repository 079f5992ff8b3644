"""Which model speaks what: candidates, lines, and their audio, which a stopped run keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fish_speech.audio import is_whole, save_audio
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
class RealClip:
    """A real recording and its transcript."""

    audio: Path
    text: str


@dataclass(frozen=True)
class Line:
    """A text to be spoken by every candidate, with a `reference` in front or without one.

    `speaker` is the name that a model with several speakers is given, `voice` the key of the real
    clips that it is compared with; `recording` is the real clip of the same text.
    """

    name: str
    text: str
    seed: int = 0
    speaker: str | None = None
    voice: str = ""
    reference: RealClip | None = None
    recording: RealClip | None = None


def plan_lines(
    texts: Sequence[Line], count: int, references: dict[str, RealClip], seed: int = 0
) -> list[Line]:
    """`count` lines without a reference, each followed by the same with one, where its voice has a
    reference.

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


def speak_line(
    line: Line, candidate: Candidate, get_tts: Callable[[], TextToSpeech], settings: Settings,
    folder: Path,
) -> tuple[Path | None, bool]:  # fmt: skip
    """Speak a line, without retries, into `folder`, or find what an earlier run spoke there.

    Returns the file (None where the model said nothing), and whether the speech was a runaway.
    `get_tts` is called only where the model is needed.
    """
    reference = line.reference and [file_digest(line.reference.audio), line.reference.text]
    settings = replace(settings, seed=line.seed, retries=0)
    inputs = [candidate.digest, line.text, line.speaker, reference, asdict(settings)]
    audio = folder / f"{line.name}.wav"

    def speak() -> dict[str, Any]:
        waveform, sample_rate, runaway = _speak(get_tts(), line, settings)
        if waveform is not None:
            save_audio(audio, waveform, sample_rate)
        return {"runaway": runaway, "empty": waveform is None}

    record = cached(
        audio.with_suffix(".json"), inputs, speak,
        is_valid=lambda found: type(found["runaway"]) is bool
        and (found["empty"] is True or is_whole(audio)),
    )  # fmt: skip
    return None if record["empty"] else audio, record["runaway"]


def cached(
    file: Path,
    inputs: Any,
    compute: Callable[[], dict[str, Any]],
    is_valid: Callable[[dict[str, Any]], bool] = lambda found: True,
) -> dict[str, Any]:
    """What `compute` returns, from `file` where it was computed from the same `inputs` before.

    `is_valid` may raise `KeyError` or `TypeError` for what a damaged file holds.
    """
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    try:
        found = read_json(file)
        if found["key"] == key and is_valid(found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is no file, or it is not ours: compute it again
    found = {"key": key, **compute()}
    write_json(file, found)
    return found


def _speak(
    tts: TextToSpeech, line: Line, settings: Settings
) -> tuple[torch.Tensor | None, int, bool]:
    """The waveform [1, N] (None if the model said nothing), its rate, and whether it is a
    runaway."""
    reference = line.reference and tts.encode_reference(line.reference.audio, line.reference.text)
    waveforms, frames, ended, runaway = [], 0, False, False
    try:
        for piece in tts.pieces(line.text, reference, line.speaker, settings):
            waveforms.append(piece.waveform)
            frames += piece.frames
            ended, runaway = ended or piece.ends_chunk, runaway or piece.ran_on
    except ValueError:
        if frames or not ended:  # it did not even begin: the reference leaves no room, say
            raise
    waveform = torch.cat(waveforms, dim=1) if frames else None
    return waveform, tts.sample_rate, runaway
