"""The options of preparing; each is a flag of prepare_dataset.py, which takes its defaults here.

(Nothing heavy is imported: `--help` has to be quick.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

WHISPER_BACKENDS = ("auto", "openai", "faster")


@dataclass(frozen=True)
class Thresholds:
    """What a clip must keep to, not to be flagged.

    `longest` and `max_unheard` are seconds, `min_snr` and `max_edge` dB, `min_rate` and `max_rate`
    letters a second of speech; the others are shares or probabilities from 0 to 1.
    """

    longest: float = 30.0
    min_snr: float = 15.0
    min_speech: float = 0.3
    max_clipping: float = 0.001
    max_edge: float = -20.0
    min_rate: float = 3.0
    max_rate: float = 30.0
    max_disagreement: float = 0.3
    max_no_speech: float = 0.6
    max_unheard: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isnan(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a number")


@dataclass(frozen=True)
class Options:
    """What to prepare, where to and how. `max_duration` is in minutes, the other durations in
    seconds; `num_workers` 0 is automatic."""

    input: str
    output: Path
    speaker: str | None = None
    youtube: bool = False
    cookies: str | None = None
    cookies_from_browser: str | None = None
    normalize: bool = False
    split_long: bool = False
    segment_duration: float = 10.0
    min_duration: float = 1.0
    max_duration: float | None = None
    auto_transcribe: bool = False
    whisper_model: str = "base"
    whisper_backend: str = "auto"
    language: str | None = None
    device: str = "auto"
    num_workers: int = 0
    drop_flagged: bool = False
    strict: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
