"""Scores of one clip: word errors, speaker similarity, pace and pitch."""

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
class ClipScores:
    """What was measured of a clip; None is what could not be.

    `letters` counts the letters and digits of the text that it should say, `heard` is the
    recogniser's transcript, `embedding` [D] the speaker's, `speech_seconds` how much of it is
    speech, `pitch` the median in Hz and the range in semitones.
    """

    seconds: float
    letters: int
    heard: str | None = None
    word_errors: Errors | None = None
    character_errors: Errors | None = None
    embedding: np.ndarray | None = None
    speech_seconds: float = 0.0
    pitch: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scorer:
    """Scores clips with a recogniser (None: no error rates) and a speaker encoder (None: no
    similarities).

    The recogniser may cache what it heard (`transcribe.CachedRecogniser`).
    """

    recogniser: Recogniser | None
    encoder: Encoder | None

    def without_asr(self) -> Scorer:
        """The same without a recogniser."""
        return replace(self, recogniser=None)

    def score(self, audio: Path | None, text: str) -> ClipScores:
        """Score a file that should say `text`; None is silence."""
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
            return ClipScores(0.0, letters, heard, words, characters)
        speech = find_speech(audio)
        return ClipScores(
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
class SpeakerProfile:
    """A speaker's real clips: their scores, and the mean of their embeddings."""

    clips: Sequence[ClipScores]

    @property
    def embeddings(self) -> list[np.ndarray]:
        return [clip.embedding for clip in self.clips if clip.embedding is not None]

    def similarity(self, clip: ClipScores) -> float | None:
        """Cosine of a clip and this speaker, -1 to 1; None where either has no embedding."""
        if clip.embedding is None or not self.embeddings:
            return None
        return similarity(clip.embedding, np.mean(self.embeddings, axis=0))

    def leave_one_out(self) -> list[float]:
        """Similarity of each real clip to all the others."""
        embeddings = self.embeddings
        if len(embeddings) < 2:
            return []
        total = np.sum(embeddings, axis=0)
        return [similarity(embedding, total - embedding) for embedding in embeddings]
