"""Sampling an id from logits on a CPU, compiled: calling twenty torch operations would take ten
times as long as the work itself."""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64

from fish_speech.models.text2semantic.decode.cpu_kernels import LEAST, compiled, exp

_ONE = float32(1)
_BISECTION_STEPS = 32  # for the top-p threshold


@compiled(float32[::1], int64[::1], float32, float32, float32, float64, gives=int64)
def sample_id(logits, previous, penalty, top_p, temperature, u):
    """The id that u, uniform in (0, 1], selects from logits [V] (see `sampling`)."""
    scores = logits.copy()
    for index in previous:  # from `logits`: an id that repeats is penalized once
        score = logits[index]
        scores[index] = score * penalty if score < 0 else score / penalty
    largest = LEAST
    for index in range(len(scores)):
        largest = max(largest, scores[index])
    weights, total = np.empty_like(scores), float32(0)
    for index in range(len(scores)):
        weights[index] = exp(scores[index] - largest)
        total += weights[index]
    # The smallest weight within top-p: all weights from it on sum up to at most top_p * total.
    threshold, lower = _ONE, float32(0)
    for _ in range(_BISECTION_STEPS if top_p < _ONE else 0):
        middle = (threshold + lower) / float32(2)
        above = float32(0)
        for index in range(len(weights)):
            above += weights[index] if weights[index] >= middle else float32(0)
        if above <= top_p * total:
            threshold = middle
        else:
            lower = middle
    total = float32(0)
    for index in range(len(weights)):
        in_top_p = top_p >= _ONE or weights[index] >= threshold
        weights[index] = exp((scores[index] - largest) / temperature) if in_top_p else float32(0)
        total += weights[index]
    cumulative, last = float64(0), 0
    for index in range(len(weights)):
        if weights[index] > 0:
            cumulative, last = cumulative + float64(weights[index]), index
            if cumulative >= u * float64(total):
                break
    return last
