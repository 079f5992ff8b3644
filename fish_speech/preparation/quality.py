"""Figures of a clip that tell whether it is fit to learn from, and the flags made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fish_speech import audio
from fish_speech.preparation.segment import FRAME_SECONDS, Segment, Speech

EDGE_SECONDS = 0.03
FULL_SCALE = 0.999


@dataclass(frozen=True)
class Thresholds:
    """What a clip must keep to. Durations in seconds, levels in dB, shares from 0 to 1."""

    shortest: float = 1.0
    longest: float = 30.0
    min_snr: float = 15.0
    min_speech: float = 0.3
    max_clipping: float = 0.001
    max_edge: float = -20.0
    min_rate: float = 3.0
    max_rate: float = 30.0
    max_disagreement: float = 0.3


def measure(samples: np.ndarray, sample_rate: int, segment: Segment, speech: Speech) -> dict:
    """Figures of a segment's samples [N] as they came from the recording, before any levelling.

    `snr` (dB) and `speech_share` come from the frames of `speech`; `edge_start` and `edge_end` are
    the levels of the first and last 30 ms against the speech in it (dB): near 0, a cut-off word.
    """
    low = int(segment.start / FRAME_SECONDS)
    high = max(low + 1, int(np.ceil(segment.end / FRAME_SECONDS)))
    power, spoken = speech.power[low:high], speech.probability[low:high] >= 0.5
    loud = float(power[spoken].mean()) if spoken.any() else float(power.mean())
    quiet = power[~spoken] if (~spoken).sum() >= 3 else np.sort(power)[: max(1, len(power) // 20)]
    edge = round(EDGE_SECONDS * sample_rate)
    return {
        "duration": round(len(samples) / sample_rate, 3),
        "speech_share": round(float(spoken.mean()), 3),
        "peak": _decibel(float(np.square(np.abs(samples).max(initial=0.0)))),
        "clipping": round(clipping(samples), 5),
        "snr": round(min(100.0, max(0.0, _decibel(loud) - _decibel(float(np.median(quiet))))), 1),
        "edge_start": round(_decibel(_mean_square(samples[:edge])) - _decibel(loud), 1),
        "edge_end": round(_decibel(_mean_square(samples[-edge:])) - _decibel(loud), 1),
    }


def clipping(samples: np.ndarray) -> float:
    """The share of samples that sit, three or more in a row, at the wave's ceiling."""
    ceiling = float(np.abs(samples).max(initial=0.0))
    if ceiling < 0.1:
        return 0.0
    at = (np.abs(samples) >= FULL_SCALE * ceiling).astype(np.int8)
    triples = at[:-2] & at[1:-1] & at[2:]
    return float(triples.sum() / len(samples)) if len(samples) > 2 else 0.0


def flags(clip: dict[str, Any], thresholds: Thresholds) -> list[str]:
    """What is wrong with a clip (an entry of the summary), as short words in a fixed order."""
    checks = {
        "too_short": clip["duration"] < thresholds.shortest,
        "too_long": clip["duration"] > thresholds.longest,
        "little_speech": clip["speech_share"] < thresholds.min_speech,
        "noisy": clip["snr"] < thresholds.min_snr,
        "clipping": clip["clipping"] > thresholds.max_clipping,
        "clipped_start": clip["edge_start"] > thresholds.max_edge,
        "clipped_end": clip["edge_end"] > thresholds.max_edge,
        "cut_in_speech": clip.get("cut_in_speech", False),
        "slow_text": clip["characters_per_second"] < thresholds.min_rate,
        "fast_text": clip["characters_per_second"] > thresholds.max_rate,
        "disagreement": clip.get("disagreement", 0.0) > thresholds.max_disagreement,
    }
    return [flag for flag, raised in checks.items() if raised]


def characters_per_second(text: str, spoken_seconds: float) -> float:
    """Letters and digits of `text` for each second of speech."""
    return round(sum(c.isalnum() for c in text) / max(0.1, spoken_seconds), 1)


def loudness(samples: np.ndarray, sample_rate: int) -> float:
    """Loudness in LUFS with one decimal; -99.9 for silence (JSON knows no infinity)."""
    return round(max(-99.9, audio.loudness(samples, sample_rate)), 1)


def _mean_square(samples: np.ndarray) -> float:
    return float(np.square(samples).mean()) if len(samples) else 0.0


def _decibel(power: float) -> float:
    return round(10 * float(np.log10(max(power, 1e-10))), 1)
