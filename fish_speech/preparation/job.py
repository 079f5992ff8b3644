"""One recording to be prepared, and the durations that its options mean for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fish_speech.audio_decoding import audio_info
from fish_speech.preparation import segment
from fish_speech.preparation.options import Options
from fish_speech.preparation.segment import Segment, Speech
from fish_speech.preparation.sources import Recording

# Seconds. More than this is no utterance, and hours of it would not fit in memory.
LONGEST_UNCUT = 120.0
CLIPS_VERSION = 6  # raise it where the same options make other clips: old ones are then made anew


@dataclass(frozen=True)
class RecordingJob:
    """One recording, how it is to be prepared, and the identity of the recogniser that helps."""

    recording: Recording
    options: Options
    recogniser: str | None = None

    @property
    def fingerprint(self) -> str:
        """A digest of all that the recording's clips depend on."""
        options, recording = self.options, self.recording
        ingredients = [
            CLIPS_VERSION, recording.digest, recording.transcript, recording.problem,
            self.recogniser, options.normalize, options.max_duration, options.min_duration,
            (options.segment_duration, self.longest) if options.split_long else None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]

    @property
    def max_seconds(self) -> float | None:
        minutes = self.options.max_duration
        return None if minutes is None else minutes * 60

    @property
    def longest(self) -> float:
        """Seconds that speech may last without being cut."""
        options = self.options
        if not options.split_long:
            return LONGEST_UNCUT
        fitting = options.thresholds.longest - 2 * segment.MARGIN_SECONDS  # not to be flagged
        return max(options.min_duration, min(segment.STRETCH * options.segment_duration, fitting))

    @property
    def seconds(self) -> float:
        """About how long the recording is, as far as it is used; 0 where it can't be read."""
        try:
            duration = audio_info(self.recording.path).duration or 0.0
        except (ValueError, OSError):
            return 0.0
        return min(duration, self.max_seconds or duration)

    def find_speech(self, max_seconds: float | None = None) -> Speech:
        """Where speech is in the recording. Raises `ValueError` where it can't be read."""
        try:
            return segment.find_speech(
                self.recording.path, max_seconds=max_seconds or self.max_seconds
            )
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror or error})") from error

    def cut(self, segments: Sequence[Segment], sample_rate: int) -> Iterator[np.ndarray]:
        """The samples [N] of each segment."""
        return segment.cut(self.recording.path, segments, sample_rate, max_seconds=self.max_seconds)
