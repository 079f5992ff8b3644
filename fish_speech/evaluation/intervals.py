"""Means over samples with 95% confidence intervals: Student's t, Wilson's for proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

from fish_speech.evaluation.leaderboard import MIN_SAMPLES, Estimate


def estimate(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
) -> Estimate | None:
    """`sum(values) / sum(weights)`, the mean without `weights`, with its 95% interval.

    For an error rate, `values` are errors and `weights` words. Values with equal `texts` are one
    sample, for another reading of a text says little about other texts. Where no value is below
    zero, neither is the interval; too few samples have none. None where there is nothing to divide
    by.
    """
    values, weights = _samples(values, weights, texts)
    if not weights.sum():
        return None
    mean, count = float(values.sum() / weights.sum()), len(values)
    if count < MIN_SAMPLES:
        return Estimate(mean, mean, mean, count)
    low, high = _interval(values, weights, 0.05)
    return Estimate(mean, low if min(values) < 0 else max(0.0, low), high, count)


def proportion(happened: Sequence[bool], texts: Sequence[str] | None = None) -> Estimate | None:
    """How often something happened, with its 95% interval; None of no samples.

    Wilson's interval, because Student's has no width where it never happened. Values with equal
    `texts` are one sample, as in `estimate`.
    """
    if not happened:
        return None
    mean, count = float(np.mean(happened)), len(set(texts or range(len(happened))))
    squared = norm.ppf(0.975) ** 2 / count
    centre = mean + squared / 2
    reach = np.sqrt(squared * (mean * (1 - mean) + squared / 4))
    low, high = ((centre + side * reach) / (1 + squared) for side in (-1, 1))
    return Estimate(mean, max(0.0, round(low, 12)), min(1.0, round(high, 12)), count)


def difference(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
    alpha: float = 0.05,
) -> tuple[float, float]:
    """The `1 - alpha` interval of the estimate of `a` less that of `b`, paired by sample.

    Paired, it finds far smaller differences than comparing two intervals would. With fewer than
    `MIN_SAMPLES` it is minus to plus infinity.
    """
    values, weights = _samples(np.subtract(a, b), weights, texts)
    if len(values) < MIN_SAMPLES or not weights.sum():
        return float("-inf"), float("inf")
    return _interval(values, weights, alpha)


def _samples(
    values: Sequence[float], weights: Sequence[float] | None, texts: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights [samples], summed by text, in order of appearance."""
    weights = np.ones(len(values)) if weights is None else weights
    places: dict = {}
    numbers = [places.setdefault(text, len(places)) for text in texts or range(len(values))]
    numbers = np.array(numbers, int)
    return np.bincount(numbers, values), np.bincount(numbers, weights)


def _interval(values: np.ndarray, weights: np.ndarray, alpha: float) -> tuple[float, float]:
    """Student's interval of `sum(values) / sum(weights)`.

    Not a bootstrap, which is too narrow for few samples: with three texts it called one of eight
    useless models better. The variance of the ratio is that of its residuals (delta method).
    """
    count, ratio = len(values), values.sum() / weights.sum()
    spread = np.std(values - ratio * weights, ddof=1) / weights.mean()
    reach = t.ppf(1 - alpha / 2, count - 1) * spread / np.sqrt(count)
    return float(ratio - reach), float(ratio + reach)
