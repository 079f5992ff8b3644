"""Pitch: of tones that are known, of a glide, of what has none."""

import tracemalloc

import numpy as np
import pytest

from fish_speech.evaluation.pitch import median_and_range, pitch

RATE = 16_000


def voice(hertz):
    """A wave of twelve harmonics whose pitch follows `hertz` [N]."""
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 13))).astype(np.float32)


@pytest.mark.parametrize("hertz", [80, 120, 220, 400])
def test_a_steady_voice_has_its_pitch_and_no_range(hertz):
    found = pitch(voice(np.full(RATE, float(hertz))), RATE)
    assert len(found) > 90
    np.testing.assert_allclose(found, hertz, rtol=5e-3)
    assert median_and_range(found)[1] < 0.2


def test_a_glide_over_an_octave_has_a_range_of_about_eleven_semitones():
    median, reach = median_and_range(pitch(voice(100 * 2 ** np.linspace(0, 1, 2 * RATE)), RATE))
    assert median == pytest.approx(100 * 2**0.5, rel=0.03)
    assert 10 < reach < 12


def test_noise_silence_and_next_to_nothing_have_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    for samples in (noise, np.zeros(RATE, np.float32), np.zeros(100, np.float32)):
        assert median_and_range(pitch(samples, RATE)) is None


def test_pauses_do_not_count():
    speech = voice(np.full(RATE, 150.0))
    with_pause = np.concatenate([speech, np.zeros(2 * RATE, np.float32), speech])
    found = pitch(with_pause, RATE)
    assert len(found) == pytest.approx(2 * len(pitch(speech, RATE)), abs=8)
    assert np.median(found) == pytest.approx(150, rel=0.01)


def test_a_long_clip_takes_little_more_memory_than_a_short_one():
    samples = np.tile(voice(np.full(RATE, 150.0)), 30)
    tracemalloc.start()
    found = pitch(samples, RATE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) > 29 * 95
    assert peak < 60e6
