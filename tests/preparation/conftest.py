"""Real speech with known text and known pauses, from the utterances in samples/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fish_speech.preparation.align import Word
from fish_speech.preparation.options import Options
from fish_speech.preparation.transcribe import Transcription

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
RATE = 16_000


@dataclass(frozen=True)
class Utterance:
    samples: np.ndarray
    text: str

    @property
    def duration(self) -> float:
        return len(self.samples) / RATE


@dataclass(frozen=True)
class Take:
    """A recording made of utterances: its path and when (start, end) each one is said."""

    path: Path
    spans: list[tuple[float, float]]
    texts: list[str]


@pytest.fixture(scope="session")
def utterances() -> list[Utterance]:
    return [
        Utterance(
            soundfile.read(path, dtype="float32")[0], path.with_suffix(".txt").read_text().strip()
        )
        for path in sorted(SAMPLES.glob("*.flac"))
    ]


@pytest.fixture
def folder(tmp_path, utterances) -> Callable[..., Path]:
    """Makes a folder with the first `count` utterances, with their transcripts or without."""

    def make(count: int = 2, name: str = "recordings", *, texts: bool = True) -> Path:
        for index, utterance in enumerate(utterances[:count]):
            path = tmp_path / name / f"take {index}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, utterance.samples, RATE)
            if texts:
                path.with_suffix(".txt").write_text(utterance.text, encoding="utf-8")
        return tmp_path / name

    return make


@pytest.fixture
def take(tmp_path, utterances) -> Callable[..., Take]:
    """Makes one long recording of utterances with these pauses (seconds, repeated) between them."""

    def make(
        count: int, pauses: Sequence[float] = (0.5,), *, name: str = "long", noise: float = 1e-4
    ) -> Take:
        parts, spans, time = [np.zeros(RATE // 2, np.float32)], [], 0.5
        for index in range(count):
            utterance = utterances[index % len(utterances)]
            silence = np.zeros(round(pauses[index % len(pauses)] * RATE), np.float32)
            parts += [utterance.samples, silence]
            spans.append((time, time + utterance.duration))
            time += utterance.duration + len(silence) / RATE
        samples = np.concatenate(parts)
        samples += np.random.default_rng(0).normal(0, noise, len(samples)).astype(np.float32)
        path = tmp_path / name / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, RATE)
        return Take(path, spans, [utterances[i % len(utterances)].text for i in range(count)])

    return make


class Reader:
    """A recogniser that reads from a script: it finds out where in `take` the samples come from.

    `mishear` replaces some words, as recognisers do. `asked` counts the clips it was given.
    """

    identity = "reader"

    def __init__(self, take: Take, mishear: dict[str, str] | None = None) -> None:
        self.recording, _ = soundfile.read(take.path, dtype="float32")
        self.words = []
        for (start, end), text in zip(take.spans, take.texts, strict=True):
            words = text.split()
            edges = np.linspace(start + 0.05, end - 0.1, len(words) + 1)
            self.words += [
                Word((mishear or {}).get(word, word), a, b)
                for word, a, b in zip(words, edges[:-1], edges[1:], strict=True)
            ]
        self.asked = 0

    def transcribe(self, samples: np.ndarray) -> Transcription:
        self.asked += 1
        offset = self.recording.tobytes().find(samples[:400].tobytes())
        start = offset / self.recording.itemsize / RATE
        words = tuple(
            Word(word.text, word.start - start, word.end - start)
            for word in self.words
            if start < (word.start + word.end) / 2 < start + len(samples) / RATE
        )
        return Transcription(" ".join(word.text for word in words), words)


@pytest.fixture
def reader() -> type[Reader]:
    return Reader


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(
        input="", output=tmp_path / "data" / "voice", speaker="Me", normalize=True, split_long=True
    )
