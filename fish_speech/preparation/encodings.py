"""Texts of unknown encoding: the reading that looks most like language, however short the text.

Statistics need pages; a transcript may be one sentence. So each encoding's reading is judged by
what no language does: letters of two scripts in one word, capitals after small letters, signs
inside words, letters that no one language has side by side, characters that are never used.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import pairwise

ENOUGH = 5000  # bytes to judge by
# The first of equally odd readings is taken.
ENCODINGS = (
    *("cp1252", "cp1255", "cp1251", "koi8_r", "cp1256", "cp1250", "cp1254", "cp1253"),
    *("euc_kr", "euc_jp", "shift_jis", "gb18030", "big5", "mac_roman"),
)
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# The letters beyond a-z of languages that are written in Latin letters.
_ALPHABETS = tuple(
    frozenset(letters)
    for letters in (
        *("äöüß", "àâæçèéêëîïôùûüÿœ", "áéíñóúüªº", "àèéìíîòóùú", "àáâãçéêíóôõúüªº", "àçèéíïòóúü"),
        *("äåéö", "åæéèêòóôø", "áæéíðóöúýþ", "áèéêëíïóöúü", "ąćęłńóśźż", "áäčďéěíĺľňóôŕřšťúůýž"),
        *("áéíóöőúüű", "âîăşţșț", "ćčđšž", "âçîöûüğışi", "äõöüšž", "çë"),
    )
)
# First bytes of the characters that are in use, where an encoding goes by rows of characters.
_COMMON = {
    "euc_kr": range(0xB0, 0xC9),
    "euc_jp": (0xA4, 0xA5, *range(0xB0, 0xD0)),
    "shift_jis": range(0x82, 0x99),
    "gb18030": range(0xB0, 0xD8),
    "big5": range(0xA4, 0xC7),
}
_JAPANESE = ("euc_jp", "shift_jis")
_ONLY_LAST = set("ךםןףץςةى")
_RARE = {**dict.fromkeys("ءآؤہٹڈڑ", 0.3), **dict.fromkeys("ðþý", 0.05)}
_BETWEEN = set("¿¡…„‚·•")
_SCRIPTS = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "EAST"),
    **dict.fromkeys(("MASCULINE", "FEMININE"), "LATIN"),  # ordinals: º, ª
}
_WIDE = ("FULLWIDTH", "IDEOGRAPHIC", "LEFT", "RIGHT", "ARABIC", "HEBREW", "GREEK", "KATAKANA")


def decode(data: bytes) -> tuple[str, str | None]:
    """The text in `data`, and its encoding where that was guessed.

    A byte order mark counts, then what is sure: UTF-16 by its every second byte, UTF-8. Raises
    `ValueError` where no encoding makes a text of it.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "replace"), None
    for encoding, high, low in (("utf-16-le", 1, 0), ("utf-16-be", 0, 1)):
        if _controls(data[high::2]) > 0.7 and _controls(data[low::2]) < 0.3:
            return data.decode(encoding, "replace"), encoding
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        wrong_at = error.start
    first = next(index for index, byte in enumerate(data) if byte > 127)
    sample = data[max(0, first - 9) : first + ENOUGH]
    damaged = sample.decode("utf-8", "replace")
    readings = [(oddness(damaged, "utf-8") + 2 * damaged.count("\ufffd"), 0, "", "utf-8")]
    for encoding in ENCODINGS:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        odd = oddness(sample.decode(encoding, "ignore"), encoding)
        readings.append((odd, len(readings), text, encoding))
    odd, _, text, encoding = min(readings)
    if odd > 0.3 * sum(byte > 127 for byte in sample):
        raise ValueError("is no text in a known encoding; save it as UTF-8")
    if encoding == "utf-8":
        raise ValueError(f"is UTF-8 with a wrong byte at {wrong_at}; save it anew")
    return text, encoding


def oddness(text: str, encoding: str) -> float:
    """How many things are in `text`, read as `encoding`, that no language does."""
    odd = 0.0
    common = _COMMON.get(encoding)
    for before, character in pairwise(f" {text} "):
        kind, kind_before = _kind(character), _kind(before)
        if kind == "odd":
            odd += 2
        elif before == "°":  # of Celsius
            pass
        elif kind == "sign" or kind_before == "sign":
            odd += 0.6 * (kind not in ("", "sign") or kind_before not in ("", "sign"))
        elif kind != kind_before and (_is_combining_mark(character) or (kind and kind_before)):
            odd += 1
        if kind and before in _ONLY_LAST:
            odd += 1
        if character.isupper() and before.islower() and before not in "ºª":
            odd += 1
        if kind in ("EAST", "HANGUL"):
            kana = "\u3040" <= character <= "\u30ff"
            odd += (common is None) or character.encode(encoding)[0] not in common
            odd += (kind == "HANGUL") != (encoding == "euc_kr")
            odd += kana and encoding not in _JAPANESE
    letters = [c for c in text if c > "\x7f" and _kind(c)]
    # KOI8 and cp1251 swap the cases; in a word of capitals, A to Z among them, nothing is swapped.
    words = (w for w in text.split() if not (w.isupper() and any("A" <= c <= "Z" for c in w)))
    odd += 0.03 * sum(c.isupper() for word in words for c in word if c > "\x7f")
    odd += sum(_RARE.get(letter, 0) for letter in text.lower())
    if latin := [letter.lower()[0] for letter in letters if _kind(letter) == "LATIN"]:
        odd += min(sum(letter not in known for letter in latin) for known in _ALPHABETS)
    if encoding in _JAPANESE and not any("\u3040" <= c <= "\u30ff" for c in text):
        odd += 1.5
    return odd


def _controls(data: bytes) -> float:
    """The share of control characters that no text has; tabs and ends of line are none."""
    return sum(byte < 32 and byte not in b"\t\n\r\f" for byte in data) / max(1, len(data))


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """The script of a letter or its mark, "sign", "odd" (no text has it), "" (between words)."""
    category = unicodedata.category(character)
    if category[0] == "L" or category == "Mn":
        script = unicodedata.name(character, "odd").split()[0].split("-")[0]
        return _SCRIPTS.get(script, script)
    if category in ("Cc", "Co", "Cn") and not character.isspace():
        return "odd"
    if character <= "\x7f" or category[0] in "ZN" or category in ("Pi", "Pf", "Pd"):
        return ""
    if category[0] == "P" and (
        character in _BETWEEN or unicodedata.name(character).startswith(_WIDE)
    ):
        return ""
    return "sign"


def _is_combining_mark(character: str) -> bool:
    return unicodedata.category(character) == "Mn"
