"""Error rates after one normalisation."""

import pytest

from fish_speech.preparation import error_rates


@pytest.mark.parametrize(
    ("text", "heard", "rate"),
    [
        ("It's late, Tom!", "its late tom", 0.0),
        ("abcde", "abxde", 0.2),
        ("abcde", "", 1.0),
        ("ab", "abcdefgh", 1.0),
        ("ＡＢＣ", "abc", 0.0),
    ],
)
def test_disagreement_is_the_character_error_rate(text, heard, rate):
    assert error_rates.disagreement(text, heard) == rate


@pytest.mark.parametrize(
    ("text", "heard", "words", "characters"),
    [
        ("It's late, Tom!", "its late tom", (0, 3), (0, 10)),
        ("Twenty-one well-known men.", "twenty one well known men", (0, 5), (0, 21)),
        ("one two", "one too two", (1, 2), (3, 6)),
        ("one two", "", (2, 2), (6, 6)),
        ("one", "two three four", (3, 1), (10, 3)),
        ("你好。", "你好", (0, 2), (0, 2)),
        ("今天天气很好。", "今天天汽很好", (1, 6), (1, 6)),
        ("...", "what", (1, 0), (4, 0)),
    ],
)
def test_errors_are_counted_in_words_and_characters(text, heard, words, characters):
    assert error_rates.word_errors(text, heard) == words
    assert error_rates.character_errors(text, heard) == characters
