"""Pitch of the voiced frames of speech, by YIN."""

from __future__ import annotations

import numpy as np

_MIN_HZ, _MAX_HZ = 60.0, 500.0
_HOP_SECONDS = 0.01
_YIN_THRESHOLD = 0.2  # above it, a dip is no period
_MIN_LEVEL = 0.05  # of the loudest frame's RMS
_BATCH_FRAMES = 1000  # whose transforms take 45 MB


def pitch(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Hz of each voiced frame [F] in samples [N] (float32); frames of two of the longest periods,
    every 10 ms."""
    longest = int(sample_rate / _MIN_HZ)
    hop = round(_HOP_SECONDS * sample_rate)
    if len(samples) < 2 * longest:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 2 * longest)[::hop]  # a view
    parts = [slice(i, i + _BATCH_FRAMES) for i in range(0, len(frames), _BATCH_FRAMES)]
    level = np.concatenate([frames[part].std(1) for part in parts])
    loud = level > _MIN_LEVEL * level.max()
    shortest = int(sample_rate / _MAX_HZ)
    found: list[float] = []
    for part in parts:
        voiced = frames[part][loud[part]].astype(np.float64)
        differences = _normalised_difference(voiced - voiced.mean(1, keepdims=True), longest)
        found += [hz for row in differences if (hz := _pick_pitch(row, shortest, sample_rate))]
    return np.array(found)


def median_and_range(hertz: np.ndarray) -> tuple[float, float] | None:
    """The median in Hz, and the semitones between the 5th and the 95th percentile; None for too
    few frames to tell."""
    if len(hertz) < 10:
        return None
    low, middle, high = np.percentile(hertz, [5, 50, 95])
    return float(middle), float(12 * np.log2(high / low))


def _normalised_difference(frames: np.ndarray, longest: int) -> np.ndarray:
    """YIN's cumulative mean normalised difference at each lag: frames [F, 2L] -> [F, L].

    It is about 1 for what has no period.
    """
    size = 1 << (3 * longest).bit_length()
    head = np.fft.rfft(frames[:, :longest], size)
    whole = np.fft.rfft(frames, size)
    correlation = np.fft.irfft(head.conj() * whole, size)[:, :longest]
    energy = np.cumsum(np.square(frames), axis=1)
    energy = np.concatenate([np.zeros((len(frames), 1)), energy], axis=1)
    shifted = energy[:, longest : 2 * longest] - energy[:, :longest]
    difference = shifted[:, :1] + shifted - 2 * correlation
    mean = np.cumsum(difference, axis=1) / np.maximum(1, np.arange(longest))
    return np.where(mean > 0, difference / np.maximum(mean, 1e-12), 1.0)


def _pick_pitch(difference: np.ndarray, shortest: int, sample_rate: int) -> float | None:
    """Hz of the first lag whose difference [L] dips below the threshold, at the bottom of the dip;
    None for an unvoiced frame."""
    below = np.flatnonzero(difference[shortest:-1] < _YIN_THRESHOLD)
    if not len(below):
        return None
    lag = int(below[0]) + shortest
    while lag + 1 < len(difference) - 1 and difference[lag + 1] < difference[lag]:
        lag += 1
    before, here, after = difference[lag - 1 : lag + 2]
    curve = before - 2 * here + after
    offset = 0.5 * (before - after) / curve if curve > 0 else 0.0
    return sample_rate / (lag + float(np.clip(offset, -1, 1)))
