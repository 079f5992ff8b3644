"""Drawing a code from its logits on a CPU, compiled: twenty operations take ten times as long to
be called as to be done."""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64

from fish_speech.models.text2semantic.decode.cpu_kernels import LEAST, compiled, exp

_ONE = float32(1)
_HALVINGS = 32  # of the distance to a threshold


@compiled(float32[::1], int64[::1], float32, float32, float32, float64, gives=int64)
def draw(logits, previous, penalty, top_p, temperature, number):
    """The id that a number above 0, at most 1, draws from logits [V] (see `sampling`)."""
    scores = logits.copy()
    for index in previous:  # those that repeat are changed once
        score = logits[index]
        scores[index] = score * penalty if score < 0 else score / penalty
    largest = LEAST
    for index in range(len(scores)):
        largest = max(largest, scores[index])
    weights, total = np.empty_like(scores), float32(0)
    for index in range(len(scores)):
        weights[index] = exp(scores[index] - largest)
        total += weights[index]
    # The least weight that stays: of those from it on, the sum is within top-p.
    least, below = _ONE, float32(0)
    for _ in range(_HALVINGS if top_p < _ONE else 0):
        middle = (least + below) / float32(2)
        above = float32(0)
        for index in range(len(weights)):
            above += weights[index] if weights[index] >= middle else float32(0)
        if above <= top_p * total:
            least = middle
        else:
            below = middle
    total = float32(0)
    for index in range(len(weights)):
        stays = top_p >= _ONE or weights[index] >= least
        weights[index] = exp((scores[index] - largest) / temperature) if stays else float32(0)
        total += weights[index]
    passed, last = float64(0), 0
    for index in range(len(weights)):
        if weights[index] > 0:
            passed, last = passed + float64(weights[index]), index
            if passed >= number * float64(total):
                break
    return last
