"""Reference recordings, whose voice is cloned: checked, and paired with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fish_speech.files import read_text, sidecar_of
from fish_speech.text import is_speakable


def check_reference(audio: str | Path, text: str) -> None:
    """Raise `FileNotFoundError` for a missing recording, `ValueError` for a text without words."""
    _check_file(audio)
    if not is_speakable(text):
        raise ValueError(f"{audio}: the reference needs its text, the words that are spoken")


def _check_file(audio: str | Path) -> None:
    if not Path(audio).is_file():
        what = "a folder, not a recording" if Path(audio).is_dir() else "no such audio file"
        raise FileNotFoundError(f"{audio}: {what}")


def pair_references(audio: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """Each recording with its text, read from the file beside it where no `texts` are given.

    Raises `FileNotFoundError` or `ValueError` where something is missing.
    """
    if texts and len(texts) != len(audio):
        raise ValueError(
            f"{len(audio)} --reference-audio, but {len(texts)} --reference-text: give one for each,"
            " or none where a .lab or .txt file lies beside the recording"
        )
    pairs = list(zip(audio, texts or map(read_transcript, audio), strict=True))
    for file, text in pairs:
        check_reference(file, text)
    return pairs


def read_transcript(audio: str | Path) -> str:
    """The text of a recording, from the `.lab` or `.txt` file beside it.

    Raises `FileNotFoundError` where the recording is missing, `ValueError` where its text is.
    """
    if (file := sidecar_of(audio)) is not None:
        return read_text(file)
    _check_file(audio)
    raise ValueError(
        f"{audio}: what does it say? Give --reference-text, or a .lab or .txt beside it"
    )
