"""Stage 1: distinct English sentences to speak, from Debian's fortunes, docstrings and templates.

Writes `train.txt` and `heldout.txt`, one sentence a line, in a fixed order. The held-out sentences
are spoken in the figures only, never in training.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from fish_speech.files import write_text
from recipes.tiny.words import NUMBERS, TEMPLATES

CACHE = Path(".cache/tiny")
FORTUNES = Path("/usr/share/games/fortunes")
MAX_WORDS, MIN_WORDS = 14, 3
_LETTERS = re.compile(r"[A-Za-z][a-z]*(?:['-][A-Za-z][a-z]*)*|[AI]")
_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")


def spell_number(value: int) -> str:
    """English words of a number from 0 to 9999.

    >>> spell_number(1984)
    'one thousand nine hundred eighty-four'
    """
    if value < 20:
        return NUMBERS[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return NUMBERS[18 + tens] + (f"-{NUMBERS[ones]}" if ones else "")
    size, name = (100, "hundred") if value < 1000 else (1000, "thousand")
    head, rest = divmod(value, size)
    return f"{spell_number(head)} {name}" + (f" {spell_number(rest)}" if rest else "")


def clean_sentence(sentence: str) -> str | None:
    """A sentence as it is spoken (letters, `, . ? ! ' -`, numbers as words), or None to skip it."""
    sentence = re.sub(r"\b\d{1,4}\b", lambda match: spell_number(int(match[0])), sentence)
    sentence = sentence.translate(str.maketrans({"’": "'", ";": ",", ":": ",", "—": ","}))
    sentence = re.sub(r"\s*--+\s*|\.\.+\s*(?=\S)", ", ", sentence)
    sentence = re.sub(r'["()]|\.\.+$', "", re.sub(r"\s+", " ", sentence)).strip(" ,'")
    if not re.search(r"[.!?]$", sentence):
        return None
    words = [word.rstrip(",") for word in sentence.rstrip(".!?").split(" ")]
    spoken = all(_LETTERS.fullmatch(word) and len(word) <= 14 for word in words)
    if not (spoken and MIN_WORDS <= len(words) <= MAX_WORDS):
        return None
    return sentence[0].upper() + sentence[1:]


def sentences_of(prose: str) -> Iterator[str]:
    """The speakable sentences of a paragraph."""
    for sentence in _END.split(re.sub(r"\s+", " ", prose)):
        if cleaned := clean_sentence(sentence):
            yield cleaned


def fortunes(folder: Path = FORTUNES) -> Iterator[str]:
    """Sentences of every cookie under `folder`. Raises `FileNotFoundError` where it is absent."""
    files = sorted(path for path in folder.glob("*") if path.suffix == "" and path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: no fortunes; run `apt-get install fortunes`")
    for path in files:
        cookies = re.split(r"^%$", path.read_text("utf-8", "replace"), flags=re.MULTILINE)
        for cookie in cookies:
            prose = re.split(r"^\s+--\s", cookie, flags=re.MULTILINE)[0]  # drop the attribution
            yield from sentences_of(re.sub(r"^[A-Z][\w .']*:\s", "", prose, flags=re.MULTILINE))


def docstrings(folder: Path | None = None) -> Iterator[str]:
    """Sentences of the docstrings of this Python's standard library, without its tests."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8", "replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    yield from sentences_of(paragraph)


def from_templates(count: int, generator: random.Random) -> Iterator[str]:
    """`count` sentences of the templates, each slot filled at random."""
    patterns = TEMPLATES["sentence"]
    for _ in range(count):
        sentence = generator.choice(patterns)
        while slot := re.search(r"<(\w+)>", sentence):
            value = generator.choice(TEMPLATES[slot[1]])
            sentence = sentence[: slot.start()] + value + sentence[slot.end() :]
        sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
        yield sentence[0].upper() + sentence[1:]


def read_sentences(name: str, cache: Path = CACHE) -> list[str]:
    """The lines of `train.txt` or `heldout.txt`. Raises `FileNotFoundError` with the remedy."""
    file = cache / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; run `python -m recipes.tiny.texts`")
    return file.read_text(encoding="utf-8").splitlines()


def collect(sources: Iterable[str], held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Split into (train, held-out), shuffled. What counts as the same ignores case and marks."""
    distinct = {re.sub(r"[^a-z]+", " ", text.lower()).strip(): text for text in sources}
    texts = [distinct[key] for key in sorted(distinct)]
    random.Random(seed).shuffle(texts)
    return texts[held_out:], texts[:held_out]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to write to")
    parser.add_argument("--templates", type=int, default=20000, help="template sentences to draw")
    parser.add_argument("--held-out", type=int, default=300, help="sentences kept for the figures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    drawn = from_templates(args.templates, random.Random(args.seed))
    sources = [*fortunes(), *docstrings(), *drawn]
    train, held_out = collect(sources, args.held_out, args.seed)
    write_text(args.cache / "train.txt", "\n".join(train) + "\n")
    write_text(args.cache / "heldout.txt", "\n".join(held_out) + "\n")
    print(
        f"{len(train)} sentences to train, {len(held_out)} held out: {args.cache}", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
