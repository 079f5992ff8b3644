"""Which part of a script is said in which stretch of a long recording.

With a recogniser's words the two word sequences are aligned as a whole, and the recording is cut
at the pauses whose place in the script is certain. Without a recogniser, or where that leaves too
long a piece, sentences are assigned to the regions of speech by their lengths. Either way the text
is the script's, every word once: pieces hold slices of it that add up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import regex

from fish_speech.preparation.error_rates import normal
from fish_speech.preparation.segment import Region, SpeechPiece
from fish_speech.text import WIDE

SENTENCE, CLAUSE, WORD = 2, 1, 0  # what ends with a unit of the script
SHORTEST_PAUSE = 0.15  # seconds; below it, a recogniser's times don't tell a pause's two sides
_TOKEN = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{P}*\s*|[^\s\p{Han}\p{Hiragana}\p{Katakana}]+\s*"
)
_CLOSERS = r"[\"'”’»›)\]}」』】》）]*\s*$"
_SENTENCE_END = regex.compile(rf"[.!?…。！？｡।؟]{_CLOSERS}")
_CLAUSE_END = regex.compile(rf"[,;:–—\-，、；：،؛]{_CLOSERS}")
_MAX_MOVE_BYTES = 1 << 28  # of the moves of an edit that are kept in memory at a time
_LONG_UNIT = 12  # tokens without punctuation after which any gap between words may be a pause


@dataclass(frozen=True)
class Word:
    """A word of a recogniser, and when it is said (seconds of the recording, or of the clip)."""

    text: str
    start: float
    end: float


def align_words(
    script: str, words: Sequence[Word], regions: Sequence[Region], *, longest: float = np.inf
) -> list[SpeechPiece]:
    """Cut at every pause whose place in the script is certain; texts are slices of `script`.

    Where a piece would be over `longest` seconds, the recogniser lost the thread, and lengths
    decide. A piece with an empty text holds speech that the script doesn't have.
    """
    tokens = _TOKEN.findall(script)
    pairs = unambiguous_matches(
        [normal(token) for token in tokens], [normal(word.text) for word in words]
    )
    middles = [(word.start + word.end) / 2 for word in words]
    pieces, region, token, word = [], 0, 0, 0  # from which on nothing is placed yet
    for index, (before, after) in enumerate(pairwise(regions)):
        if after[0] - before[1] < SHORTEST_PAUSE:
            continue
        next_word = int(np.searchsorted(middles, (before[1] + after[0]) / 2))
        next_token = _token_at_word(pairs, next_word, len(tokens), len(words))
        if next_token is not None:
            text = "".join(tokens[token:next_token])
            pieces += _place_text(text, words[word:next_word], regions[region : index + 1], longest)
            region, token, word = index + 1, next_token, next_word
    return pieces + _place_text("".join(tokens[token:]), words[word:], regions[region:], longest)


def _place_text(
    text: str, words: Sequence[Word], regions: Sequence[Region], longest: float
) -> list[SpeechPiece]:
    """Text and words between two certain cuts as a piece, or as several where it is too long."""
    start, end = regions[0][0], regions[-1][1]
    heard = " ".join(word.text.strip() for word in words)
    if end - start <= longest or len(regions) == 1 or not text.strip():
        return [SpeechPiece(start, end, text, heard)]
    pieces = []
    for piece in align_lengths(text, regions):
        inside = [w.text.strip() for w in words if w.start < piece.end and piece.start < w.end]
        pieces.append(replace(piece, heard=" ".join(inside)))
    return pieces


def align_lengths(
    script: str, regions: Sequence[Region], *, band: float | None = None
) -> list[SpeechPiece]:
    """Assign sentences and clauses to regions of speech by how long each should take to say.

    Dynamic programming over both: groups of clauses and groups of regions are paired so that their
    lengths fit, sentences end at long pauses and no long pause is inside a clause. Only pairs that
    are at most `band` seconds of speech apart, if all is said at one rate, are considered.
    """
    units = _units(script)
    if not units:  # nothing but white space
        return [SpeechPiece(regions[0][0], regions[-1][1], script)]
    weights = np.array([0.5 + spoken_letters(text) for text, _ in units])
    lengths = np.array([end - start for start, end in regions])
    said = np.concatenate([[0.0], np.cumsum(weights * lengths.sum() / weights.sum())])
    spoken = np.concatenate([[0.0], np.cumsum(lengths)])
    pauses = np.array([after[0] - before[1] for before, after in pairwise(regions)] + [1.0])
    # The cost of the end of a unit without a pause, and of a pause where no unit ends.
    missed_end = np.cumsum([0.0] + [(0.0, 0.3, 2.0)[strength] for _, strength in units])
    missed_pause = np.concatenate([[0.0], np.cumsum(np.clip(4 * (pauses - 0.15), 0, 3))])
    max_units = max(12, 3 * len(units) // len(regions) + 1)
    max_regions = max(10, 3 * len(regions) // len(units) + 1)
    width = float(np.clip(0.05 * spoken[-1], 15, 600)) if band is None else band
    rows, steps = _BandedMatrix(), [(0, np.zeros(1, np.int32))]
    rows.add(0, np.zeros(1))
    for unit, (_, strength) in enumerate(units, 1):
        low, high = np.searchsorted(spoken, (said[unit] - width, said[unit] + width))
        low, high = max(1, int(low)), min(len(regions), int(high))
        if unit == len(units):
            low = high = len(regions)
        u, left = max(0, unit - max_units), low - max_regions
        before = rows.block(u, unit, left, high)
        before += (missed_end[unit - 1] - missed_end[u:unit])[:, None]
        expected = (said[unit] - said[u:unit])[:, None, None]
        here = np.arange(low, high + 1)  # [I]; below, all arrays are [units back, I, regions back]
        origin = here[:, None] - np.arange(max_regions, 0, -1)
        off = (spoken[here][:, None] - spoken[np.maximum(origin, 0)])[None] - expected
        total = before[:, origin - left] + off**2 / (0.12 * expected + 0.04)
        total += missed_pause[here - 1][:, None] - missed_pause[np.maximum(origin, 0)]
        total = total.transpose(1, 0, 2).reshape(len(here), -1)
        best = total.argmin(axis=1)
        row = total.min(axis=1) + _pause_cost(strength, pauses[here - 1])
        rows.add(low, row)
        back, aside = np.divmod(best, max_regions)  # the step that led here, as one number
        step = (unit - u - back) * (max_regions + 1) + max_regions - aside
        steps.append((low, step.astype(np.int32)))
    if not np.isfinite(row[-1]):  # no way through the band
        return align_lengths(script, regions, band=np.inf)
    return _trace_back(units, regions, steps, max_regions)


def _pause_cost(strength: int, pauses: np.ndarray) -> np.ndarray:
    """What it costs that a unit of this strength ends at each of these pauses [P], in seconds."""
    if strength == SENTENCE:
        return 2 * np.clip(1 - pauses / 0.4, 0, 1)
    return np.full(len(pauses), 0.5 if strength == CLAUSE else 3.0)


def unambiguous_matches(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs (index in `a`, index in `b`) of equal words in a cheapest edit of `a` into `b`.

    A substitution costs less than a deletion and an insertion, but more than either. Where words
    repeat and some were not recognised, there are several cheapest edits; a pair that another one
    does not have is left out, since it may put words into the wrong place.
    """
    last_a, last_b = len(a) - 1, len(b) - 1
    backwards = {(last_a - i, last_b - j) for i, j in _cheapest_matches(a[::-1], b[::-1])}
    return [pair for pair in _cheapest_matches(a, b) if pair in backwards]


def _cheapest_matches(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Those of one of the cheapest edits."""
    pairs, j = [], len(b)
    for i, low, moves in _banded_edit_moves(a, b):
        while j and moves[j - low] == 2:
            j -= 1
        if not j:
            break
        if moves[j - low] == 0:
            j -= 1
            if a[i] == b[j] and a[i]:
                pairs.append((i, j))
    return pairs[::-1]


def _banded_edit_moves(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Backtrace of the edit distance: for each word of `a`, from the last to the first, its index,
    a column `low`, and the moves (0 both, 1 only `a`, 2 only `b`) that led to the cells of its row
    from that column on.

    A deletion or an insertion costs 2, a substitution 3. Only a band around the diagonal is
    computed, so that hours of words fit in memory; where much was not recognised the band is wide,
    and the moves are computed a second time, block by block.
    """
    skipped, changed = 2, 3
    number = {word: index for index, word in enumerate({*a, *b})}
    a = np.array([number[word] for word in a], np.int32)
    b = np.array([number[word] for word in b], np.int32)
    width = 1000 + abs(len(a) - len(b))
    far = skipped * (len(a) + len(b) + 1)  # outside the band, and never the cheapest
    steps = skipped * np.arange(len(b) + 1, dtype=np.int32)
    row = np.where(np.arange(len(b) + 1) <= width, steps, far).astype(np.int32)

    def advance(i: int, row: np.ndarray) -> tuple[int, int, np.ndarray]:
        """The moves over word `i`; updates the costs in `row` [len(b) + 1] in place."""
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

    size = max(1, _MAX_MOVE_BYTES // min(2 * width + 1, len(b) + 1))
    blocks = [range(i, min(i + size, len(a))) for i in range(0, len(a), size)]
    rows, moves = [], []
    for block in blocks:
        rows.append(row.copy())
        moves.clear()
        moves.extend(advance(i, row) for i in block)
    for block, row in zip(reversed(blocks), reversed(rows), strict=True):
        yield from reversed(moves or [advance(i, row) for i in block])
        moves.clear()


def _token_at_word(
    pairs: list[tuple[int, int]], word: int, token_count: int, word_count: int
) -> int | None:
    """The index of the script token at the recognised word `word`, where that is certain."""
    position = int(np.searchsorted([index for _, index in pairs], word)) if pairs else 0
    token, before = pairs[position - 1] if position else (-1, -1)
    next_token, after = pairs[position] if position < len(pairs) else (token_count, word_count)
    between = next_token - token - 1
    if between == 0:
        return token + 1
    # As many recognised words as the script has: substitutions, each in its place.
    return token + word - before if between == after - before - 1 else None


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
    """How long a text takes to say, in letters: a wide character counts as 3, a digit as 4."""
    wide = len(regex.findall(WIDE, text))
    digits = len(regex.findall(r"\p{N}", text))
    return sum(map(str.isalnum, text)) + 2 * wide + 3 * digits


class _BandedMatrix:
    """A matrix of costs of which only a band is stored, row by row; infinity outside of it."""

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


def _trace_back(
    units: list[tuple[str, int]],
    regions: Sequence[Region],
    steps: list[tuple[int, np.ndarray]],
    max_regions: int,
) -> list[SpeechPiece]:
    """The cheapest path, from its end; a step is units * (max_regions + 1) + regions."""
    pieces, (unit, region) = [], (len(units), len(regions))
    while unit or region:
        low, row = steps[unit]
        back, aside = divmod(int(row[region - low]), max_regions + 1)
        text = "".join(text for text, _ in units[unit - back : unit])
        start, end = regions[region - aside][0], regions[region - 1][1]
        pieces.append(SpeechPiece(start, end, text, estimated=True))
        unit, region = unit - back, region - aside
    return pieces[::-1]
