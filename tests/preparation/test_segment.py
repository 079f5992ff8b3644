"""Cuts fall into pauses, at the right times, and what is kept is exactly what was there."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from fish_speech.preparation import segment
from fish_speech.preparation.segment import Segment, Speech, SpeechPiece

PAUSES = (0.25, 0.8, 0.4, 1.5, 0.3, 0.6)


def plan(speech: Speech, target: float) -> list[Segment]:
    longest = segment.STRETCH * target
    pieces = segment.speech_pieces(speech, longest=longest)
    return segment.plan_segments(
        pieces, 0.0, speech.duration, target=target, longest=longest, shortest=1.0
    )


@pytest.mark.parametrize("noise", [1e-5, 0.005], ids=["clean", "noisy"])
def test_cuts_lie_in_true_pauses_close_to_the_speech(take, noise):
    recording = take(24, PAUSES, noise=noise)
    speech = segment.find_speech(recording.path)
    segments = plan(speech, 6.0)
    assert len(segments) >= 12
    errors = []
    for before, after in pairwise(segments):
        assert before.end <= after.start
        assert not before.cut_in_speech
        cut = (before.end + after.start) / 2
        # The nearest true pause; a pause of the sentence's own, at a comma, is further away.
        errors.append(
            min(
                max(0.0, end - cut, cut - start)
                for (_, end), (start, _) in pairwise(recording.spans)
            )
        )
    assert np.mean(np.array(errors) < 0.15) >= 0.95
    # Utterances hold 50 ms of silence before and 100 ms after the speech.
    starts = [min(abs(s.start + 0.2 - (a + 0.05)) for a, _ in recording.spans) for s in segments]
    ends = [min(abs(s.end - 0.2 - (b - 0.1)) for _, b in recording.spans) for s in segments]
    assert np.mean(np.array(starts + ends) < 0.15) >= 0.95


def test_a_soft_onset_that_the_vad_is_late_for_is_kept(tmp_path, utterances):
    for utterance in utterances[12:16]:  # the VAD finds one of them 200 ms late
        soundfile.write(tmp_path / "a.wav", utterance.samples, 16_000)
        (first, *_) = segment.find_speech(tmp_path / "a.wav").regions
        assert first[0] < 0.12


def test_segments_have_the_wanted_length(take):
    speech = segment.find_speech(take(20, (0.4,)).path)
    for target in (5.0, 10.0, 15.0):
        lengths = [part.end - part.start for part in plan(speech, target)]
        assert max(lengths) <= 1.5 * target + 0.4
        assert np.median(lengths) == pytest.approx(target, rel=0.4)


def test_longer_pauses_are_preferred():
    pieces = [SpeechPiece(0, 3), SpeechPiece(3.2, 6), SpeechPiece(6.7, 9.5)]
    first, second = segment.plan_segments(pieces, 0, 10, target=6, longest=9, shortest=1)
    assert (first.start, first.end) == (0.0, 6.2)
    assert (second.start, second.end) == (6.5, 9.7)


def test_margins_share_a_short_pause():
    first, second = segment.plan_segments(
        [SpeechPiece(1, 9), SpeechPiece(9.1, 17)], 0, 17.05, target=8, longest=12, shortest=1
    )
    assert (first.start, second.end) == (0.8, 17.05)
    assert first.end == second.start == pytest.approx(9.05)


def test_no_margin_reaches_into_what_others_say():
    (only,) = segment.plan_segments(
        [SpeechPiece(4, 9)], 3.95, 9.1, target=8, longest=12, shortest=1
    )
    assert (only.start, only.end) == (3.95, 9.1)


def test_speech_without_a_pause_is_cut_where_it_is_quietest_and_flagged():
    frames = 1000
    power = np.full(frames, 0.01)
    power[480:484] = 1e-6
    duration = frames * segment.FRAME_SECONDS
    speech = Speech(duration, np.ones(frames), power, [(0.0, duration)])
    segments = plan(speech, 12.0)
    assert (
        segments[0].end == segments[1].start == pytest.approx(482 * segment.FRAME_SECONDS, abs=0.1)
    )
    assert all(part.cut_in_speech for part in segments)


def test_cut_yields_exactly_the_samples_of_each_segment(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 100 * 16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16_000, "FLOAT")
    segments = [Segment(0.5, 1.25), Segment(1.25, 2.0), Segment(29.0, 61.0), Segment(99.0, 100.0)]
    parts = list(segment.cut(tmp_path / "a.wav", segments, 16_000))
    assert len(parts) == 4
    for part, samples in zip(segments, parts, strict=True):
        expected = noise[round(part.start * 16_000) : round(part.end * 16_000)]
        assert np.array_equal(samples, expected)


def test_cut_reads_no_further_than_the_last_segment(tmp_path, monkeypatch):
    read = []

    def blocks(path, sample_rate, max_seconds=None):
        for index in range(1000):
            read.append(index)
            yield np.zeros(sample_rate, np.float32)

    monkeypatch.setattr(segment, "decode_blocks", blocks)
    assert [len(part) for part in segment.cut("a.wav", [Segment(2.0, 3.5)], 100)] == [150]
    assert read == [0, 1, 2, 3]


def test_fade_touches_only_the_ends():
    samples = np.ones(1000, np.float32)
    faded = segment.fade_edges(samples, 16_000)
    assert faded[0] == faded[-1] == 0
    assert np.all(faded[80:-80] == 1)
    assert samples.all()


def test_max_seconds_and_the_number_of_threads_are_kept(take):
    import torch

    recording = take(4)
    torch.set_num_threads(2)
    try:
        assert segment.find_speech(recording.path, max_seconds=5).duration == 5
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_text_and_what_was_heard_stay_with_their_pieces():
    pieces = [
        SpeechPiece(0, 3, "One, ", "one"),
        SpeechPiece(3.2, 6, "two. ", "too"),
        SpeechPiece(7, 13, "Three."),
    ]
    first, second = segment.plan_segments(pieces, 0, 14, target=6, longest=9, shortest=1)
    assert (first.text, first.heard) == ("One, two.", "one too")
    assert second == replace(second, text="Three.", heard=None)
