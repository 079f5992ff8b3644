"""Which part of a script is said in which stretch of a long recording.

With a recogniser's words the two word sequences are aligned as a whole, and the recording is cut
where both a pause and a place between two script words are certain. With none, or where they leave
too long a piece, sentences are laid on the islands of speech by their lengths. Either way
the text is the script's, every word once: pieces hold slices of it that add up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import regex

from fish_speech.preparation.error_rates import normal
from fish_speech.preparation.segment import Piece
from fish_speech.text import WIDE

Island = tuple[float, float]

SENTENCE, CLAUSE, WORD = 2, 1, 0
SHORTEST_PAUSE = 0.15  # seconds; below it, a recogniser's times don't tell a pause's two sides
_TOKEN = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{P}*\s*|[^\s\p{Han}\p{Hiragana}\p{Katakana}]+\s*"
)
_CLOSERS = r"[\"'”’»›)\]}」』】》）]*\s*$"
_SENTENCE_END = regex.compile(rf"[.!?…。！？｡।؟]{_CLOSERS}")
_CLAUSE_END = regex.compile(rf"[,;:–—\-，、；：،؛]{_CLOSERS}")
_MOST_MOVES = 1 << 28  # of an edit, in bytes, that are kept at a time
_LONG_UNIT = 12  # tokens without punctuation after which any gap between words may be a pause


@dataclass(frozen=True)
class Word:
    """A word that a recogniser heard, and when (seconds of the recording)."""

    text: str
    start: float
    end: float


def align_words(
    script: str, words: Sequence[Word], islands: Sequence[Island], *, longest: float = np.inf
) -> list[Piece]:
    """Cut at every pause whose place in the script is certain; texts are slices of `script`.

    Where a piece would be over `longest` seconds, the recogniser did not follow: lengths decide. A
    piece with an empty text holds speech that the script doesn't have.
    """
    tokens = _TOKEN.findall(script)
    pairs = match([normal(token) for token in tokens], [normal(word.text) for word in words])
    middles = [(word.start + word.end) / 2 for word in words]
    pieces, first, token, heard = [], 0, 0, 0
    for index, (before, after) in enumerate(pairwise(islands)):
        if after[0] - before[1] < SHORTEST_PAUSE:
            continue
        next_heard = int(np.searchsorted(middles, (before[1] + after[0]) / 2))
        next_token = _place(pairs, next_heard, len(tokens), len(words))
        if next_token is not None:
            text = "".join(tokens[token:next_token])
            pieces += _lay(text, words[heard:next_heard], islands[first : index + 1], longest)
            first, token, heard = index + 1, next_token, next_heard
    return pieces + _lay("".join(tokens[token:]), words[heard:], islands[first:], longest)


def _lay(
    text: str, words: Sequence[Word], islands: Sequence[Island], longest: float
) -> list[Piece]:
    """Text and words between two certain places as a piece, or as several where it is too long."""
    start, end = islands[0][0], islands[-1][1]
    heard = " ".join(word.text.strip() for word in words)
    if end - start <= longest or len(islands) == 1 or not text.strip():
        return [Piece(start, end, text, heard)]
    pieces = []
    for piece in align_lengths(text, islands):
        inside = [w.text.strip() for w in words if w.start < piece.end and piece.start < w.end]
        pieces.append(replace(piece, heard=" ".join(inside)))
    return pieces


def align_lengths(
    script: str, islands: Sequence[Island], *, band: float | None = None
) -> list[Piece]:
    """Lay sentences and clauses on islands of speech by how long each should take to say.

    Dynamic programming over both: groups of clauses and groups of islands are paired so that their
    lengths fit, sentences end at long pauses and no long pause is inside a clause. Only pairs that
    lie at most `band` seconds of speech apart at an even rate are looked at.
    """
    units = _units(script)
    weights = np.array([0.5 + spoken_letters(text) for text, _ in units])
    lengths = np.array([end - start for start, end in islands])
    said = np.concatenate([[0.0], np.cumsum(weights * lengths.sum() / weights.sum())])
    spoken = np.concatenate([[0.0], np.cumsum(lengths)])
    pauses = np.array([after[0] - before[1] for before, after in pairwise(islands)] + [1.0])
    # What an end of a unit costs unless a pause follows it, and a pause unless a unit ends there.
    missed_end = np.cumsum([0.0] + [(0.0, 0.3, 2.0)[strength] for _, strength in units])
    missed_pause = np.concatenate([[0.0], np.cumsum(np.clip(4 * (pauses - 0.15), 0, 3))])
    most_units = max(12, 3 * len(units) // len(islands) + 1)
    most_islands = max(10, 3 * len(islands) // len(units) + 1)
    reach = float(np.clip(0.05 * spoken[-1], 15, 600)) if band is None else band
    rows, steps = _Rows(), [(0, np.zeros(1, np.int32))]
    rows.add(0, np.zeros(1))
    for unit, (_, strength) in enumerate(units, 1):
        low, high = np.searchsorted(spoken, (said[unit] - reach, said[unit] + reach))
        low, high = max(1, int(low)), min(len(islands), int(high))
        if unit == len(units):
            low = high = len(islands)
        u, left = max(0, unit - most_units), low - most_islands
        before = rows.block(u, unit, left, high)
        before += (missed_end[unit - 1] - missed_end[u:unit])[:, None]
        expected = (said[unit] - said[u:unit])[:, None, None]
        here = np.arange(low, high + 1)  # [I]; below, all arrays are [units back, I, islands back]
        origin = here[:, None] - np.arange(most_islands, 0, -1)
        off = (spoken[here][:, None] - spoken[np.maximum(origin, 0)])[None] - expected
        total = before[:, origin - left] + off**2 / (0.12 * expected + 0.04)
        total += missed_pause[here - 1][:, None] - missed_pause[np.maximum(origin, 0)]
        total = total.transpose(1, 0, 2).reshape(len(here), -1)
        best = total.argmin(axis=1)
        row = total.min(axis=1) + _pause_cost(strength, pauses[here - 1])
        rows.add(low, row)
        back, aside = np.divmod(best, most_islands)  # the step that led here, as one number
        step = (unit - u - back) * (most_islands + 1) + most_islands - aside
        steps.append((low, step.astype(np.int32)))
    if not np.isfinite(row[-1]):  # no way through the band
        return align_lengths(script, islands, band=np.inf)
    return _pieces_of_path(units, islands, steps, most_islands)


def _pause_cost(strength: int, pauses: np.ndarray) -> np.ndarray:
    """What it costs that a unit of this strength ends at each of these pauses (seconds) [P]."""
    if strength == SENTENCE:
        return 2 * np.clip(1 - pauses / 0.4, 0, 1)
    return np.full(len(pauses), 0.5 if strength == CLAUSE else 3.0)


def match(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs (index in `a`, index in `b`) of equal words in a cheapest edit of `a` into `b`.

    A word for another costs less than one gone and one added, but more than either. Where words
    repeat and some were not heard, there are several cheapest edits; a pair that another one would
    not have is left out, since it may put words to the wrong place.
    """
    last_a, last_b = len(a) - 1, len(b) - 1
    backwards = {(last_a - i, last_b - j) for i, j in _one_match(a[::-1], b[::-1])}
    return [pair for pair in _one_match(a, b) if pair in backwards]


def _one_match(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """One of the cheapest edits."""
    pairs, j = [], len(b)
    for i, low, moves in _edit(a, b):
        while j and moves[j - low] == 2:
            j -= 1
        if not j:
            break
        if moves[j - low] == 0:
            j -= 1
            if a[i] == b[j] and a[i]:
                pairs.append((i, j))
    return pairs[::-1]


def _edit(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[int, int, np.ndarray]]:
    """The cheapest edits, backwards: for each word of `a` its index, a column `low`, and the moves
    (0 both, 1 only `a`, 2 only `b`) that led to the cells behind it from that column on.

    A word that is skipped costs 2, one that is changed 3. Only a band around the diagonal is looked
    at, so that hours of words fit in memory; where much was not heard the band is wide, and the
    moves are made a second time, block by block.
    """
    skipped, changed = 2, 3
    number = {word: index for index, word in enumerate({*a, *b})}
    a = np.array([number[word] for word in a], np.int32)
    b = np.array([number[word] for word in b], np.int32)
    width = 1000 + abs(len(a) - len(b))
    far = skipped * (len(a) + len(b) + 1)  # outside the band, and never the cheapest
    steps = skipped * np.arange(len(b) + 1, dtype=np.int32)
    row = np.where(np.arange(len(b) + 1) <= width, steps, far).astype(np.int32)

    def behind(i: int, row: np.ndarray) -> tuple[int, int, np.ndarray]:
        """The moves over word `i`; brings the costs in `row` [len(b) + 1] there."""
        center = (i + 1) * len(b) // len(a)
        low, high = max(0, center - width), min(len(b), center + width)
        best = row[low : high + 1] + skipped
        move = np.ones(len(best), np.int8)
        both = row[low:high] + changed * (a[i] != b[low:high])
        better = both <= best[1:]
        best[1:][better], move[1:][better] = both[better], 0
        ramp = steps[: len(best)]
        cheapest = np.minimum.accumulate(best - ramp) + ramp
        move[cheapest < best] = 2
        row[low : high + 1] = cheapest
        return i, low, move

    size = max(1, _MOST_MOVES // min(2 * width + 1, len(b) + 1))
    blocks = [range(i, min(i + size, len(a))) for i in range(0, len(a), size)]
    rows, moves = [], []
    for block in blocks:
        rows.append(row.copy())
        moves.clear()
        moves.extend(behind(i, row) for i in block)
    for block, row in zip(reversed(blocks), reversed(rows), strict=True):
        yield from reversed(moves or [behind(i, row) for i in block])
        moves.clear()


def _place(
    pairs: list[tuple[int, int]], heard: int, token_count: int, word_count: int
) -> int | None:
    """The script token that the heard word number `heard` begins, where that is certain."""
    position = int(np.searchsorted([word for _, word in pairs], heard)) if pairs else 0
    token, word = pairs[position - 1] if position else (-1, -1)
    next_token, next_word = pairs[position] if position < len(pairs) else (token_count, word_count)
    between = next_token - token - 1
    if between == 0:
        return token + 1
    # As many words heard as the script has: misheard ones, each in its place.
    return token + heard - word if between == next_word - word - 1 else None


def _units(script: str) -> list[tuple[str, int]]:
    """Cut a script into clauses: each with what ends it (SENTENCE, CLAUSE, WORD)."""
    units, current = [], []
    for token in _TOKEN.findall(script):
        current.append(token)
        strength = _strength(token)
        if strength > WORD or len(current) >= _LONG_UNIT:
            units.append(("".join(current), strength))
            current = []
    if current:
        units.append(("".join(current), SENTENCE))
    return units


def _strength(token: str) -> int:
    if _SENTENCE_END.search(token):
        return SENTENCE
    return CLAUSE if _CLAUSE_END.search(token) else WORD


def spoken_letters(text: str) -> int:
    """How long a text takes to say, in letters: a digit is a word, so is many a wide character."""
    wide = len(regex.findall(WIDE, text))
    digits = len(regex.findall(r"\p{N}", text))
    return sum(map(str.isalnum, text)) + 2 * wide + 3 * digits


class _Rows:
    """Rows of a wide matrix of costs of which only a band is kept; infinity outside of it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, np.ndarray]] = []

    def add(self, low: int, row: np.ndarray) -> None:
        self.rows.append((low, row))

    def block(self, first: int, stop: int, low: int, high: int) -> np.ndarray:
        """Rows `first`..`stop - 1`, columns `low`..`high - 1`."""
        block = np.full((stop - first, high - low), np.inf)
        for index, (start, row) in enumerate(self.rows[first:stop]):
            a, b = max(low, start), min(high, start + len(row))
            if a < b:
                block[index, a - low : b - low] = row[a - start : b - start]
        return block


def _pieces_of_path(
    units: list[tuple[str, int]],
    islands: Sequence[Island],
    steps: list[tuple[int, np.ndarray]],
    most_islands: int,
) -> list[Piece]:
    """Walk back from the end; a step is units * (most_islands + 1) + islands."""
    pieces, (unit, island) = [], (len(units), len(islands))
    while unit or island:
        low, row = steps[unit]
        back, aside = divmod(int(row[island - low]), most_islands + 1)
        text = "".join(text for text, _ in units[unit - back : unit])
        start, end = islands[island - aside][0], islands[island - 1][1]
        pieces.append(Piece(start, end, text, estimated=True))
        unit, island = unit - back, island - aside
    return pieces[::-1]
