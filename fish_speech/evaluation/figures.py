"""Means over samples and how certain they are: bootstrap intervals, seeded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

from fish_speech.evaluation.leaderboard import Figure

_RESAMPLES = 2000
FEWEST = 3  # samples, below which nothing is certain


def figure(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
) -> Figure | None:
    """`sum(values) / sum(weights)`, the mean without `weights`, with its 95% interval.

    For a rate, `values` are errors and `weights` words: sentences are resampled, and what they sum
    up to is divided. Values of the same one of `texts` are one sample: to speak it again tells
    little of other texts. None where there is nothing to divide by.
    """
    values, weights = _samples(values, weights, texts)
    if not sum(weights):
        return None
    mean = float(sum(values) / sum(weights))
    low, high = _interval(values, weights)
    return Figure(mean, min(low, mean), max(high, mean), len(values))  # in spite of rounding


def share(happened: Sequence[bool], texts: Sequence[str] | None = None) -> Figure | None:
    """How often something happened, with its 95% interval; None of no samples.

    Wilson's interval: resamples of what never happened would say that it never will. Takes of the
    same one of `texts` are one sample, as in `figure`.
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
) -> tuple[float, float]:
    """The 95% interval of the figure of `a` less that of `b`, over the same samples.

    Resampling both alike tells far smaller differences than comparing two intervals would. With
    next to no samples, nothing is certain: minus to plus infinity.
    """
    values, weights = _samples(np.subtract(a, b), weights, texts)
    if len(values) < FEWEST:
        return float("-inf"), float("inf")
    return _interval(values, weights)


def _samples(
    values: Sequence[float], weights: Sequence[float] | None, texts: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of each sample: one for each of the texts, in order of appearance."""
    weights = np.ones(len(values)) if weights is None else weights
    places: dict = {}
    numbers = [places.setdefault(text, len(places)) for text in texts or range(len(values))]
    numbers = np.array(numbers, int)
    return np.bincount(numbers, values), np.bincount(numbers, weights)


def _interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Between which the figure lies in 95% of all worlds, as resamples of these samples tell.

    Resamples of few samples vary less than samples would, so the percentiles are moved outwards by
    what Student's distribution has over the normal one (Hesterberg, 2015).
    """
    count = len(values)
    outside = 0.025
    if count > 1:
        outside = norm.cdf(t.ppf(0.025, count - 1) * np.sqrt(count / (count - 1)))
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    totals = drawn @ np.asarray(weights, float)  # [R]
    sums = drawn @ np.asarray(values, float)
    found = sums[totals > 0] / totals[totals > 0]
    low, high = np.quantile(found, [outside, 1 - outside])
    return float(low), float(high)
