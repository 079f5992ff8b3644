"""Clips of a long recording get their part of the script: every word once, none in a wrong clip."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fish_speech.preparation import align
from fish_speech.preparation.align import Word

SCRIPT = (
    "When the war had ended, the captain went home. He did not write; he was no man of letters! "
    '"You are late," she said. That was all. Dr. Miller played chess every Thursday, and he lost.'
)


def spoken(sentences: list[str], pause: float = 0.5, seed: int = 0):
    """Words and regions of sentences read at an uneven pace, a pause after each."""
    rng, time, words, regions = random.Random(seed), 0.0, [], []
    for sentence in sentences:
        pace, start = 0.06 * rng.uniform(0.85, 1.15), time
        for text in sentence.split():
            words.append(Word(text, time, time + pace * (len(text) + 1)))
            time = words[-1].end
        regions.append((start, time))
        time += pause
    return words, regions


def sentences_of(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        " ".join(
            "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(3, 14))
        )
        + "."
        for _ in range(count)
    ]


def folded(pieces) -> str:
    return "".join(piece.text for piece in pieces).strip()


def test_words_that_were_heard_right_place_every_sentence():
    sentences = sentences_of(40)
    words, regions = spoken(sentences)
    pieces = align.align_words(" ".join(sentences), words, regions)
    assert [piece.text.strip() for piece in pieces] == sentences
    assert [(piece.start, piece.end) for piece in pieces] == regions


def test_a_misheard_word_in_seven_moves_no_word():
    sentences, rng = sentences_of(60), random.Random(1)
    words, regions = spoken(sentences)
    heard = []
    for word in words:
        kind = rng.random()
        if kind < 0.07:
            heard.append(Word("blah", word.start, word.end))  # taken for another
        elif kind < 0.11:
            middle = (word.start + word.end) / 2
            heard += [Word("uh", word.start, middle), Word(word.text, middle, word.end)]  # added
        elif kind > 0.03:
            heard.append(word)  # else not heard at all
    pieces = align.align_words(" ".join(sentences), heard, regions)
    assert folded(pieces) == " ".join(sentences)
    spans = dict(zip(regions, sentences, strict=True))
    for piece in pieces:
        inside = [text for (a, b), text in spans.items() if piece.start <= a and b <= piece.end]
        assert piece.text.strip() == " ".join(inside)
    assert len(pieces) > 45  # where a cut is in doubt, two sentences stay together


def test_speech_that_is_not_in_the_script_has_no_text():
    sentences = sentences_of(9)
    words, regions = spoken(sentences)
    script = " ".join(sentences[:4] + sentences[5:])
    pieces = align.align_words(script, words, regions)
    assert folded(pieces) == script
    assert [index for index, piece in enumerate(pieces) if not piece.text] == [4]
    assert pieces[4].heard == sentences[4]


def test_where_the_recogniser_does_not_follow_lengths_decide():
    sentences = sentences_of(40)
    words, regions = spoken(sentences)
    lost = [replace(word, text="blah") if 60 < i < 200 else word for i, word in enumerate(words)]
    lost = [word for i, word in enumerate(lost) if not 60 < i < 200 or i % 3]
    script = " ".join(sentences)
    whole = align.align_words(script, lost, regions)
    assert max(piece.end - piece.start for piece in whole) > 30
    pieces = align.align_words(script, lost, regions, longest=15)
    assert folded(pieces) == script
    assert max(piece.end - piece.start for piece in pieces) < 15
    assert {piece.estimated for piece in pieces} == {True, False}
    assert all("blah" in piece.heard for piece in pieces[12:20])
    right = sum(piece.text.strip() in sentences for piece in pieces)
    assert right > 0.8 * len(pieces)


def test_a_script_that_says_more_than_the_recording_loses_no_word():
    sentences = sentences_of(9)
    words, regions = spoken(sentences[:3] + sentences[5:])
    pieces = align.align_words(" ".join(sentences), words, regions)
    assert folded(pieces) == " ".join(sentences)


def test_lengths_alone_place_sentences_though_pauses_are_missing_and_added():
    right = total = 0
    for seed in range(5):
        rng, sentences = random.Random(seed), sentences_of(60, seed)
        words, whole = spoken(sentences, seed=seed)
        regions = [whole[0]]
        for start, end in whole[1:]:
            if rng.random() < 0.1:  # read on without a pause
                regions[-1] = (regions[-1][0], end)
            elif rng.random() < 0.4 and end - start > 1:  # a breath in the middle
                middle = start + rng.uniform(0.3, 0.7) * (end - start)
                regions += [(start, middle - 0.1), (middle + 0.1, end)]
            else:
                regions.append((start, end))
        pieces = align.align_lengths(" ".join(sentences), regions)
        assert folded(pieces) == " ".join(sentences)
        for piece in pieces:
            said = [w.text for w in words if piece.start <= (w.start + w.end) / 2 <= piece.end]
            right += piece.text.split() == said
        total += len(pieces)
    assert total > 200
    assert right >= 0.9 * total


def test_lengths_keep_every_word_whatever_the_islands():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 17, 90):
        edges = np.cumsum(rng.uniform(0.1, 3.0, 2 * count))
        regions = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        for script in (
            SCRIPT,
            "Yes.",
            "no punctuation at all " * 40,
            "昨日は雨でした。今日は晴れです。",
        ):
            pieces = align.align_lengths(script.strip(), regions)
            assert folded(pieces) == script.strip()
            assert pieces[0].start == regions[0][0]
            assert pieces[-1].end == regions[-1][1]
            assert all(piece.text for piece in pieces)


@pytest.mark.parametrize(
    "clauses",
    [
        ["昨天下了雨，", "今天很晴朗。”", "我们去公园！", "他说；", "她也去。"],
        ["昨日は雨でした、", "今日は晴れです。", "行こう」：", "と言った。"],
        ["어제는 비가 왔고, ", "오늘은 맑다. ", "“산책하자!” ", "그가 말했다."],
        ["It rained — ", "it’s “very” dry now; ", "a well-known ‘sea’ - ", "so."],
    ],
)
def test_clauses_end_at_punctuation_in_any_script(clauses):
    script = "".join(clauses)
    assert [text for text, _ in align._units(script)] == clauses
    regions, time = [], 0.0
    for clause in clauses:
        regions.append((time, time + 0.1 * align.spoken_letters(clause)))
        time = regions[-1][1] + 0.5
    assert [piece.text for piece in align.align_lengths(script, regions)] == clauses


def test_a_long_chinese_script_has_few_units():
    assert len(align._units("今天天气很好，我们走。" * 2500)) == 5000


def test_hours_are_aligned_in_seconds():
    sentences = sentences_of(900)  # more than one hour
    words, regions = spoken(sentences)
    script = " ".join(sentences)
    assert len(align.align_words(script, words, regions)) == len(sentences)
    assert folded(align.align_lengths(script, regions)) == script


def test_match_pairs_equal_words_in_order():
    a = ["the", "cat", "sat", "on", "the", "mat"]
    b = ["a", "cat", "sat", "at", "on", "mat"]
    assert align.unambiguous_matches(a, b) == [(1, 1), (2, 2), (3, 4), (5, 5)]
    assert align.unambiguous_matches([], b) == align.unambiguous_matches(a, []) == []
    assert align.unambiguous_matches([""], [""]) == []


def test_match_is_a_longest_one():
    rng = random.Random(0)
    for _ in range(50):
        a, b = (rng.choices("abcd", k=rng.randint(0, 12)) for _ in range(2))
        pairs = align.unambiguous_matches(a, b)
        assert pairs == sorted(pairs)
        assert all(a[i] == b[j] for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


def test_a_script_of_which_half_was_heard_does_not_fill_the_memory(monkeypatch):
    rng = random.Random(0)
    script = rng.choices([f"word {number}" for number in range(500)], k=2400)
    heard = [word for word in script[:600] + script[1200:1900] if rng.random() < 0.9]
    pairs = align.unambiguous_matches(script, heard)
    assert len(pairs) > 1000
    monkeypatch.setattr(align, "_MAX_MOVE_BYTES", 1 << 18)  # of three million
    tracemalloc.start()
    try:
        assert align.unambiguous_matches(script, heard) == pairs
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("script", "heard", "certain"),
    [
        ("we looked at the sea the sea was calm", "we looked at the sea was calm", (0, 1, 2, 5, 6)),
        ("never again never again we left", "never again we left", (2, 3)),
    ],
)
def test_words_that_repeat_are_not_placed_where_they_may_not_have_been(script, heard, certain):
    pairs = align.unambiguous_matches(script.split(), heard.split())
    assert {j for _, j in pairs} <= set(certain)
    assert (len(script.split()) - 1, len(heard.split()) - 1) in pairs


def test_a_script_of_white_space_has_no_words_to_place():
    (piece,) = align.align_lengths(" \n", [(0.0, 1.0), (2.0, 3.0)])
    assert (piece.start, piece.end, piece.text) == (0.0, 3.0, " \n")
