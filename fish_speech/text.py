"""Text as the model reads it: cleaning, cutting into chunks, and how long its speech can be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from io import StringIO
from itertools import accumulate, groupby, pairwise
from unicodedata import normalize

import regex

_PLAIN_QUOTES = str.maketrans("‘’", "''")
# A picture, with what modifies or joins it: skin tones, variation selectors, tags, keycap frames.
_EMOJI = regex.compile(
    r"(?:(?:\p{Emoji_Presentation}|\p{Emoji_Modifier}|\p{Extended_Pictographic}\uFE0F"
    r"|(?<=\u200D)\p{Extended_Pictographic})[\uFE0F\U000E0020-\U000E007F]*\u200D?)+"
    r"|\uFE0F?\u20E3|\uFE0F"
)
_CONTROL = regex.compile(r"(?![\n\t])[\p{Cc}\p{Cs}]")
_INVISIBLE = regex.compile(r"(?![\u200C\u200D])[\p{Cf}\p{Co}]")  # these two joiners shape letters
_REPEATED_MARK = regex.compile(r"([.,])\1+")
_SPEAKABLE = regex.compile(r"[\p{L}\p{N}]")
_SYMBOL = regex.compile(r"[\p{S}%&@#§]")  # unlike a punctuation mark, somebody may want it read

_CLOSERS = r"[\"'”’»›)\]}」』】》）]*+"
_OPENERS = r"[\"'“‘«‹(\[{「『【《（]*+"
_FULL_STOPS, _COMMAS = "。！？．｡।؟።", "，、；：､،؛"
WIDE = r"[\p{Han}\p{Hiragana}\p{Katakana}]"  # scripts that write no spaces between words
_SYLLABLE = rf"{WIDE}|\p{{Hangul}}"  # what is written as one letter
_NO_DECIMAL = r"(?!(?<=\d)[．，：]\d)"  # not the mark of "3．14"
# Where a chunk may end, the best places first, with what a cut there costs against a short chunk.
_CUTS = (
    (-0.25, regex.compile(r"\n\n")),
    (
        0.0,
        regex.compile(
            rf"(?<![.!?…])[.!?…]++{_CLOSERS}\s++(?!\p{{Ll}})"
            rf"|(?<={WIDE})[.!?…]++{_CLOSERS}(?={_OPENERS}{WIDE})"
            rf"|(?<![{_FULL_STOPS}]){_NO_DECIMAL}[{_FULL_STOPS}]++{_CLOSERS}\s*"
        ),
    ),
    (
        0.5,
        regex.compile(
            rf"(?<![,;:!?…])[,;:!?…]++{_CLOSERS}\s+|\s+(?=[–—(](?!\s*\d))|—+"
            rf"|(?<={WIDE})[,;:]++{_CLOSERS}(?={_OPENERS}{WIDE})"
            rf"|(?<![{_COMMAS}]){_NO_DECIMAL}[{_COMMAS}]++{_CLOSERS}\s*"
        ),
    ),
    (2.0, regex.compile(rf"(?<!\d)\s++|\s++(?!\d)|(?<={WIDE})(?={WIDE})")),
    (4.0, regex.compile(r"\s++")),  # between numbers too, where they are a long list
)
_CHARACTER_COST = 8.0
# The end of a heading: a paragraph without a mark would run into the next. By the mark it gets.
_HEADING_END = {
    "。": regex.compile(rf"(?<={WIDE})({_CLOSERS})\n\n"),
    ".": regex.compile(rf"(?<=[\p{{L}}\p{{M}}\p{{N}}])({_CLOSERS})\n\n"),
}
# What is cut last of all: an address, a number, else between graphemes.
_ATOM = regex.compile(
    rf"(?:[A-Za-z0-9._%+-]{{1,64}}(?:://|@)|www\.)(?:(?!{WIDE})\S)+"
    r"|[+-]?\p{N}[\p{N}.,:'’/+-]*|\X"
)
_GRAPHEME = regex.compile(r"\X")
_LONGEST_ATOM = 100.0  # seconds of speech: more would be at odds with a model's context

# A full stop after these ends no sentence; after the second group, where a number follows.
_ABBREVIATION = regex.compile(
    r"\p{L}|.*\..*"  # an initial; what has a stop inside, as "e.g" or "p.m"
    r"|mr|mrs|ms|mx|dr|prof|rev|fr|st|sr|jr|hon|pres|gov|sen|rep|gen|col|maj|capt|lt|sgt|cmdr"
    r"|vs|etc|al|cf|ca|approx|dept|est|inc|ltd|co|corp|bros|univ|ave|blvd|rd|mt|ft"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|hr|frau|bzw|usw|mme|mlle|sra|srta|sig|dott",
    regex.IGNORECASE,
)
_NUMBER_LABEL = regex.compile(r"nos?|nr|núm|vol|figs?|pp?|pg|ch|sec|art|eq", regex.IGNORECASE)
# "1." or "2)" that begins a line or follows a sentence; it belongs to what it numbers.
_LIST_NUMBER = regex.compile(r"(?:\A|\n|(\p{L}++)[.!?:;]\s)\s*\(?\d{1,3}[.)]\s*+\Z")
_LAST_WORD = regex.compile(r"[\p{L}\p{M}.]+(?=\.\s*+\Z)")


def clean_text(text: str) -> str:
    """The text as the model was trained to read it.

    Accents become part of their letters (NFC), curly single quotes straight, repeated full stops
    and commas one; emoji and invisible characters go, control characters become spaces, the ends
    are stripped. Words stay as they are.

    >>> clean_text("  It’s ‘ok’ 😀 now,,, yes  ")
    "It's 'ok'  now, yes"
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_PLAIN_QUOTES)
    text = normalize("NFC", text)
    text = _INVISIBLE.sub("", _CONTROL.sub(" ", _EMOJI.sub("", text)))
    text = normalize("NFC", text)  # again: an accent may have lost what kept it from its letter
    return _REPEATED_MARK.sub(r"\1", text).strip()


def split_lines(text: str) -> list[str]:
    """The lines as editors count them: form feeds and Unicode separators begin none.

    >>> split_lines("One.\\r\\nStill\\fthe second.\\n")
    ['One.', 'Still\\x0cthe second.']
    """
    return [line.rstrip("\n") for line in StringIO(text, newline=None)]


def spoken_text(text: str) -> str:
    """A text of one chunk as the model is given it: clean, a space wherever there is white space.

    >>> spoken_text("It’s late,,,\\nyou know")
    "It's late, you know"
    """
    return " ".join(clean_text(text).split())


def is_speakable(text: str) -> bool:
    """Whether there is anything to say: a letter or a number of any script."""
    return _SPEAKABLE.search(text) is not None


def split_text(text: str, *, min_bytes: int = 100, max_bytes: int = 150) -> list[str]:
    """Clean a text and cut it into chunks of about `min_bytes` to `max_bytes` of UTF-8.

    Cut at paragraphs and sentences, where those are too long at clauses, then words, and only a
    monstrous word between characters; never in a number, an abbreviation, an address or a
    grapheme. Short sentences share a chunk, a heading before them gets a full stop. Nothing is lost
    but punctuation by itself: symbols in a row that no word shares a chunk with are one that
    `is_speakable` tells apart.
    """
    text = regex.sub(r"[^\S\n]+", " ", clean_text(text))
    text = regex.sub(r"\n{2,}", "\n\n", regex.sub(r" ?\n ?", "\n", text))
    for mark, end in _HEADING_END.items():
        text = end.sub(rf"\1{mark}\n\n", text)
    sizes = [0, *accumulate(len(character.encode()) for character in text)]
    cuts = {0: 0.0, len(text): 0.0}
    _find_cuts(text, (0, len(text)), 0, max_bytes, sizes, cuts)
    ends = _cheapest_ends(sorted(cuts.items()), sizes, min_bytes, max_bytes)
    chunks = (" ".join(text[start:end].split()) for start, end in pairwise([0, *ends]))
    split: list[str] = []
    for speakable, group in groupby(chunks, is_speakable):
        group = list(group)
        split += group if speakable else filter(_SYMBOL.search, [" ".join(group)])
    return split


def max_speech_seconds(text: str) -> float:
    """Upper bound, in seconds, of the speech of `text`: about twice an unhurried reading."""
    letters, wide = _count_letters(text)
    digits = sum(map(str.isnumeric, text))  # each may be a word of its own: "1984" is four
    others = len(text) - letters - wide - digits
    return 1.5 + 0.15 * letters + 0.5 * wide + 0.6 * digits + 0.1 * others


def min_speech_seconds(text: str) -> float:
    """Lower bound, in seconds, of the speech of `text`: nobody reads faster."""
    letters, wide = _count_letters(text)
    return letters / 40 + wide / 12


def _count_letters(text: str) -> tuple[int, int]:
    """How many letters there are, and how many that are a syllable each."""
    wide = len(regex.findall(_SYLLABLE, text))
    return sum(map(str.isalpha, text)) - wide, wide


def _find_cuts(
    text: str, span: tuple[int, int], level: int, limit: int, sizes: list[int], cuts: dict
) -> None:
    """Add one level's cuts to `cuts` {place: cost}; parts over the limit go to the next level."""
    start, end = span
    if level == len(_CUTS):
        cost = _CHARACTER_COST
        found = [start + place for place in _character_cuts(text[start:end], limit)]
    else:
        cost, pattern = _CUTS[level]
        matches = pattern.finditer(text, start, end)
        found = [m.end() for m in matches if start < m.end() < end and not _abbreviated(text, m)]
    cuts.update(dict.fromkeys(found, cost))
    for piece in pairwise([start, *found, end]) if level < len(_CUTS) else ():
        # Paragraphs are always looked into: a short one is joined with a sentence of the next.
        if level == 0 or sizes[piece[1]] - sizes[piece[0]] > limit:
            _find_cuts(text, piece, level + 1, limit, sizes, cuts)


def _abbreviated(text: str, cut: regex.Match) -> bool:
    """Whether a cut follows a full stop that ends no sentence: "Dr. Who", "No. 5", "1. Item"."""
    if cut.group().count("\n") > 1:  # no abbreviation outlives its paragraph
        return False
    window = max(0, cut.start() - 24)
    if number := _LIST_NUMBER.search(text, window, cut.end()):
        before = number.group(1) or ""  # in "Jan. 5." and "No. 5." it numbers nothing
        return not (_ABBREVIATION.fullmatch(before) or _NUMBER_LABEL.fullmatch(before))
    word = _LAST_WORD.search(text, window, cut.end())
    if word is None:
        return False
    if _NUMBER_LABEL.fullmatch(word.group()):
        return text[cut.end() : cut.end() + 1].isdigit()
    return _ABBREVIATION.fullmatch(word.group()) is not None


def _character_cuts(text: str, limit: int) -> Iterator[int]:
    """Cuts between atoms, as few as the limit allows; inside one only if it is too long to say."""
    size = 0
    for atom in _ATOM.finditer(text):
        whole = max_speech_seconds(atom.group()) <= _LONGEST_ATOM
        for part in [atom] if whole else _GRAPHEME.finditer(text, atom.start(), atom.end()):
            width = len(part.group().encode())
            if size and size + width > limit:
                yield part.start()
                size = 0
            size += width


def _cheapest_ends(
    cuts: list[tuple[int, float]], sizes: list[int], min_bytes: int, max_bytes: int
) -> list[int]:
    """Choose the chunks' ends that minimise the cuts' costs plus the squared shortfalls."""
    offsets = [sizes[place] for place, _ in cuts]
    best, came_from = [0.0], [0]
    for index in range(1, len(cuts)):
        first = min(bisect_left(offsets, offsets[index] - max_bytes), index - 1)

        def total(start: int, index: int = index) -> float:
            shortfall = max(0, min_bytes - (offsets[index] - offsets[start])) / min_bytes
            return best[start] + shortfall**2

        start = min(range(first, index), key=total)
        best.append(total(start) + cuts[index][1])
        came_from.append(start)
    ends, index = [], len(cuts) - 1
    while index:
        ends.append(cuts[index][0])
        index = came_from[index]
    return ends[::-1]
