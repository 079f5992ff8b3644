"""How far what was heard is from what was to be said: word and character error rates.

Both texts are normalised alike (`NORMALISATION`); numbers stay as they are written.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import regex

from fish_speech.text import WIDE

NORMALISATION = (
    "lower case, compatibility forms unified, hyphens as spaces, letters and digits only; "
    "each Chinese or Japanese character is a word"
)
_ALONE = regex.compile(WIDE)
_HYPHENS = dict.fromkeys(map(ord, "-‐‑‒–—"), " ")


class Errors(NamedTuple):
    """Edits (changed, missing, added) against `length` words or characters that were to be said."""

    count: int
    length: int


def normal(text: str) -> str:
    """The letters and digits of `text`, without case and compatibility forms."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def normal_words(text: str) -> str:
    """The words of `text` as `normal` has them, a space between; scripts that write no spaces have
    a word a character.

    >>> normal_words("Twenty-one, isn't it?")
    'twenty one isnt it'
    """
    text = _ALONE.sub(r" \g<0> ", text.translate(_HYPHENS))
    return " ".join(filter(None, map(normal, text.split())))


def word_errors(text: str, heard: str) -> Errors:
    """Of `heard` against `text`, in words."""
    return _errors(normal_words(text), normal_words(heard))


def character_errors(text: str, heard: str) -> Errors:
    """Of `heard` against `text`, in letters and digits."""
    said, heard = (" ".join(normal(part)) for part in (text, heard))  # each a word to jiwer
    return _errors(said, heard)


def disagreement(text: str, heard: str) -> float:
    """The character error rate of `heard` against `text`, at most 1."""
    count, length = character_errors(text, heard)
    return round(min(1.0, count / max(1, length)), 3)


def _errors(said: str, heard: str) -> Errors:
    """Of the words in `heard`."""
    if not said:  # which jiwer refuses
        return Errors(len(heard.split()), 0)
    import jiwer

    found = jiwer.process_words(said, heard)
    return Errors(found.substitutions + found.deletions + found.insertions, len(said.split()))
