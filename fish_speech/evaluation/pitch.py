"""How high a voice speaks and how lively: the pitch of its voiced frames, after YIN."""

from __future__ import annotations

import numpy as np

_LOWEST, _HIGHEST = 60.0, 500.0  # Hz
_HOP_SECONDS = 0.01
_APERIODIC = 0.2  # above it, a frame's dips are no period
_QUIET = 0.05  # of the loudest frame, root mean square
_FRAMES_AT_ONCE = 1000  # whose transforms take 45 MB


def pitch(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Hz of each voiced frame [F] in samples [N] (float32); frames of two periods, every 10 ms."""
    longest = int(sample_rate / _LOWEST)
    hop = round(_HOP_SECONDS * sample_rate)
    if len(samples) < 2 * longest:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 2 * longest)[::hop]  # a view
    parts = [slice(i, i + _FRAMES_AT_ONCE) for i in range(0, len(frames), _FRAMES_AT_ONCE)]
    level = np.concatenate([frames[part].std(1) for part in parts])
    loud = level > _QUIET * level.max()
    shortest = int(sample_rate / _HIGHEST)
    found: list[float] = []
    for part in parts:
        voiced = frames[part][loud[part]].astype(np.float64)
        dips = _normalised_difference(voiced - voiced.mean(1, keepdims=True), longest)
        found += [hz for row in dips if (hz := _first_dip(row, shortest, sample_rate))]
    return np.array(found)


def median_and_range(hertz: np.ndarray) -> tuple[float, float] | None:
    """The median in Hz, and the semitones between the 5th and the 95th percentile; None for too
    few frames to tell."""
    if len(hertz) < 10:
        return None
    low, middle, high = np.percentile(hertz, [5, 50, 95])
    return float(middle), float(12 * np.log2(high / low))


def _normalised_difference(frames: np.ndarray, longest: int) -> np.ndarray:
    """How unlike a frame is to itself at each lag: frames [F, 2L] -> [F, L], about 1 by chance."""
    size = 1 << (3 * longest).bit_length()
    head = np.fft.rfft(frames[:, :longest], size)
    whole = np.fft.rfft(frames, size)
    alike = np.fft.irfft(head.conj() * whole, size)[:, :longest]
    energy = np.cumsum(np.square(frames), axis=1)
    energy = np.concatenate([np.zeros((len(frames), 1)), energy], axis=1)
    shifted = energy[:, longest : 2 * longest] - energy[:, :longest]
    unlike = shifted[:, :1] + shifted - 2 * alike
    mean = np.cumsum(unlike, axis=1) / np.maximum(1, np.arange(longest))
    return np.where(mean > 0, unlike / np.maximum(mean, 1e-12), 1.0)


def _first_dip(unlike: np.ndarray, shortest: int, sample_rate: int) -> float | None:
    """Hz of the first lag that is a period: a dip below the threshold, at its bottom."""
    below = np.flatnonzero(unlike[shortest:-1] < _APERIODIC)
    if not len(below):
        return None
    lag = int(below[0]) + shortest
    while lag + 1 < len(unlike) - 1 and unlike[lag + 1] < unlike[lag]:
        lag += 1
    before, here, after = unlike[lag - 1 : lag + 2]
    curve = before - 2 * here + after
    offset = 0.5 * (before - after) / curve if curve > 0 else 0.0
    return sample_rate / (lag + float(np.clip(offset, -1, 1)))
