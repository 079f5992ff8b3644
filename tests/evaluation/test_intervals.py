"""Means with intervals that hold the truth, and differences told from chance."""

import numpy as np
import pytest

from fish_speech.evaluation.intervals import difference, estimate, proportion


def test_a_rate_is_errors_over_words_and_its_interval_surrounds_it():
    found = estimate([0, 1, 2, 0], [5, 10, 5, 20])
    assert found.mean == pytest.approx(3 / 40)
    assert 0 <= found.low < found.mean < found.high <= 0.4
    assert found.n == 4
    assert estimate([]) is None
    assert estimate([1.0], [0]) is None


@pytest.mark.parametrize("count", [3, 12])
def test_an_interval_holds_the_truth_about_19_times_in_20(count):
    rng = np.random.default_rng(1)
    found = [estimate(list(rng.normal(0.7, 0.1, count))) for _ in range(500)]
    assert 0.93 < np.mean([each.low <= 0.7 <= each.high for each in found]) < 0.97
    words = [rng.integers(3, 20, 12) for _ in range(500)]
    found = [estimate(list(rng.binomial(each, 0.3)), list(each)) for each in words]
    assert 0.9 < np.mean([each.low <= 0.3 <= each.high for each in found]) < 0.98


def test_an_interval_covers_other_texts_and_not_only_other_takes_of_these():
    rng = np.random.default_rng(3)
    texts, count = [text for text in "abcd" for _ in range(6)], 200
    found = []
    for _ in range(count):
        hard = np.repeat(rng.normal(0, 0.2, 4), 6)
        found.append(estimate(list(hard + rng.normal(0, 0.05, 24)), texts=texts))
    assert found[0].n == 4
    assert np.mean([each.low <= 0 <= each.high for each in found]) > 0.85


def test_a_paired_difference_is_found_where_the_samples_vary_far_more():
    rng = np.random.default_rng(2)
    base = rng.normal(0.5, 0.3, 12)
    low, high = difference(base + rng.normal(0.1, 0.02, 12), base)
    assert 0 < low < 0.1 < high < 0.15
    assert difference(base, base) == (0, 0)
    low, high = difference(base + rng.normal(0, 0.02, 12), base)
    assert low < 0 < high


def test_with_next_to_no_samples_nothing_is_certain():
    assert difference([1, 1], [0, 0]) == (float("-inf"), float("inf"))
    assert difference([], []) == (float("-inf"), float("inf"))
    assert estimate([0.2, 0.4]).too_few == "2 samples"
    assert not estimate([0.2, 0.4, 0.3]).too_few


def test_what_never_happened_in_a_few_samples_may_still_happen():
    never, once = proportion([False] * 12), proportion([True] + [False] * 11)
    assert (never.mean, never.low) == (0, 0)
    assert 0.2 < never.high < 0.3  # three in twelve would be the rule of thumb
    assert once.low > 0 < once.mean == 1 / 12 < once.high
    assert proportion([False] * 1200).high < 0.01
    assert proportion([True] * 12).high == 1
    assert proportion([]) is None


def test_takes_of_one_text_are_one_sample_of_a_share_too():
    texts = [text for text in "abcdef" for _ in range(4)]
    assert proportion([True] * 2 + [False] * 22, texts).n == 6
    assert proportion([False] * 24, texts) == proportion([False] * 6)
    assert (
        proportion([True] * 4 + [False] * 20, texts).high == proportion([True] + [False] * 5).high
    )


def test_the_interval_of_a_share_holds_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(3)
    found = [proportion(list(rng.random(40) < 0.15)) for _ in range(400)]
    assert 0.92 < np.mean([each.low <= 0.15 <= each.high for each in found]) < 0.99
