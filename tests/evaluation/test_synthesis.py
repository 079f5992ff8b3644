"""Which lines are spoken."""

from pathlib import Path

import pytest

from fish_speech.evaluation.synthesis import Line, RealClip, plan_lines

REFERENCE = RealClip(Path("r.wav"), "Reference.")


def test_few_texts_are_spoken_again_with_other_seeds():
    lines = plan_lines([Line("", "a"), Line("", "b")], 5, {})
    assert [(line.text, line.seed) for line in lines] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2),
    ]  # fmt: skip
    assert len({line.name for line in lines}) == 5


def test_of_many_texts_some_are_chosen_evenly():
    lines = plan_lines([Line("", str(number)) for number in range(100)], 4, {})
    assert [line.text for line in lines] == ["0", "25", "50", "75"]
    assert {line.seed for line in lines} == {0}


def test_a_reference_is_put_in_front_of_its_own_voice_only():
    lines = plan_lines([Line("", "a", voice="A"), Line("", "b", voice="B")], 2, {"A": REFERENCE})
    assert [(line.text, line.reference) for line in lines] == [
        ("a", None), ("a", REFERENCE), ("b", None),
    ]  # fmt: skip


def test_texts_without_words_are_passed_over():
    assert [line.text for line in plan_lines([Line("", "?!"), Line("", "a")], 1, {})] == ["a"]
    with pytest.raises(ValueError, match="no text to speak"):
        plan_lines([Line("", "...")], 3, {})
