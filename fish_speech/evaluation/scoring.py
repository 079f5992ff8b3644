"""What can be told of a clip by listening to it: words, voice, pace and pitch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fish_speech.audio import load_audio
from fish_speech.evaluation.pitch import median_and_range, pitch
from fish_speech.evaluation.speaker import SAMPLE_RATE, similarity
from fish_speech.evaluation.xvector import Encoder
from fish_speech.preparation.error_rates import Errors, character_errors, word_errors
from fish_speech.preparation.segment import FRAME_SECONDS, find_speech
from fish_speech.preparation.transcribe import Recogniser


@dataclass(frozen=True)
class Clip:
    """What was heard in a clip; what could not be told is None.

    `vector` is its voice [D], `letters` those of the text it should say, `speech` the seconds of
    speech in it, `pitch` the median in Hz and the range in semitones.
    """

    seconds: float
    letters: int
    heard: str | None = None
    words: Errors | None = None
    characters: Errors | None = None
    vector: np.ndarray | None = None
    speech: float = 0.0
    pitch: tuple[float, float] | None = None


@dataclass(frozen=True)
class Listener:
    """The instruments: a recogniser (None: no error rates) and a speaker encoder (None: no voices).

    The recogniser may remember what it heard (`transcribe.CachedRecogniser`).
    """

    recogniser: Recogniser | None
    encoder: Encoder | None

    def deaf(self) -> Listener:
        """The same without a recogniser."""
        return replace(self, recogniser=None)

    def listen(self, audio: Path | None, text: str) -> Clip:
        """Listen to a file that should say `text`; None is silence."""
        letters = sum(map(str.isalnum, text))
        if audio is None:
            samples = np.zeros(0, np.float32)
        else:
            samples = load_audio(audio, SAMPLE_RATE)[0][0].numpy()
        heard = words = characters = None
        if self.recogniser is not None:
            heard = self.recogniser.transcribe(samples).text if len(samples) else ""
            words, characters = word_errors(text, heard), character_errors(text, heard)
        if not len(samples):
            return Clip(0.0, letters, heard, words, characters)
        speech = find_speech(audio)
        return Clip(
            len(samples) / SAMPLE_RATE,
            letters,
            heard,
            words,
            characters,
            self.encoder.embed(samples) if self.encoder is not None else None,
            float((speech.probability >= 0.5).sum() * FRAME_SECONDS),
            median_and_range(pitch(samples, SAMPLE_RATE)),
        )


@dataclass(frozen=True)
class Voice:
    """A voice as its real clips have it: the mean of their vectors, and each clip."""

    clips: Sequence[Clip]

    @property
    def vectors(self) -> list[np.ndarray]:
        return [clip.vector for clip in self.clips if clip.vector is not None]

    def similarity(self, clip: Clip) -> float | None:
        """How like this voice a clip is, -1 to 1; None where either has no voice."""
        if clip.vector is None or not self.vectors:
            return None
        return similarity(clip.vector, np.mean(self.vectors, axis=0))

    def within(self) -> list[float]:
        """How like the others each real clip is."""
        vectors = self.vectors
        if len(vectors) < 2:
            return []
        total = np.sum(vectors, axis=0)
        return [similarity(vector, total - vector) for vector in vectors]
