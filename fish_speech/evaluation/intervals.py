"""Means over samples and how certain they are: Student's intervals, Wilson's for shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

from fish_speech.evaluation.leaderboard import FEWEST, Figure


def figure(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
) -> Figure | None:
    """`sum(values) / sum(weights)`, the mean without `weights`, with its 95% interval.

    For a rate, `values` are errors and `weights` words. Values of the same one of `texts` are one
    sample: to speak it again tells little of other texts. What is never below zero has no interval
    below it, and too few samples have none. None where there is nothing to divide by.
    """
    values, weights = _samples(values, weights, texts)
    if not weights.sum():
        return None
    mean, count = float(values.sum() / weights.sum()), len(values)
    if count < FEWEST:
        return Figure(mean, mean, mean, count)
    low, high = _interval(values, weights, 0.05)
    return Figure(mean, low if min(values) < 0 else max(0.0, low), high, count)


def share(happened: Sequence[bool], texts: Sequence[str] | None = None) -> Figure | None:
    """How often something happened, with its 95% interval; None of no samples.

    Wilson's interval: by the spread of what never happened it never will. Takes of the same one of
    `texts` are one sample, as in `figure`.
    """
    if not happened:
        return None
    mean, count = float(np.mean(happened)), len(set(texts or range(len(happened))))
    squared = norm.ppf(0.975) ** 2 / count
    centre = mean + squared / 2
    reach = np.sqrt(squared * (mean * (1 - mean) + squared / 4))
    low, high = ((centre + side * reach) / (1 + squared) for side in (-1, 1))
    return Figure(mean, max(0.0, round(low, 12)), min(1.0, round(high, 12)), count)


def difference(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
    alpha: float = 0.05,
) -> tuple[float, float]:
    """The interval of the figure of `a` less that of `b`, over the same samples: it misses the
    truth in `alpha` of all cases.

    Taken sample by sample it tells far smaller differences than comparing two intervals would. With
    next to no samples, nothing is certain: minus to plus infinity.
    """
    values, weights = _samples(np.subtract(a, b), weights, texts)
    if len(values) < FEWEST or not weights.sum():
        return float("-inf"), float("inf")
    return _interval(values, weights, alpha)


def _samples(
    values: Sequence[float], weights: Sequence[float] | None, texts: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of each sample: one for each of the texts, in order of appearance."""
    weights = np.ones(len(values)) if weights is None else weights
    places: dict = {}
    numbers = [places.setdefault(text, len(places)) for text in texts or range(len(values))]
    numbers = np.array(numbers, int)
    return np.bincount(numbers, values), np.bincount(numbers, weights)


def _interval(values: np.ndarray, weights: np.ndarray, alpha: float) -> tuple[float, float]:
    """Student's interval of `sum(values) / sum(weights)`.

    Not by resampling, which can't reach beyond the samples: with three texts it called one of eight
    useless models better. A ratio moves by what each sample has over it, as a mean does.
    """
    count, ratio = len(values), values.sum() / weights.sum()
    spread = np.std(values - ratio * weights, ddof=1) / weights.mean()
    reach = t.ppf(1 - alpha / 2, count - 1) * spread / np.sqrt(count)
    return float(ratio - reach), float(ratio + reach)
