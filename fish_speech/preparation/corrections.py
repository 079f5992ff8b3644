"""Texts that were corrected by hand in `.lab` files, by the seconds of the recording they are of.

They outlive the clips, which other options cut or name differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json


class Corrections:
    """The corrections of a data set, in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = read_json(path) if path.is_file() else []
        self.entries = {self.key(entry): entry for entry in entries}

    @staticmethod
    def key(clip: dict[str, Any]) -> tuple[str, float, float]:
        recording = clip["file"].rpartition("_")[0]  # the clip's number may change
        return recording.casefold(), clip["start"], clip["end"]

    def note(self, clip: dict[str, Any], text: str) -> None:
        """Remember the `text` of a clip, if it isn't the one that the clip was made with."""
        if text == clip["text"]:
            self.entries.pop(self.key(clip), None)
        else:
            about = {name: clip[name] for name in ("file", "source", "start", "end")}
            self.entries[self.key(clip)] = {**about, "text": text, "instead_of": clip["text"]}

    def find(self, clip: dict[str, Any], *, any_text: bool) -> str | None:
        """The corrected text of a clip's seconds; unless `any_text`, only if made for its text."""
        entry = self.entries.get(self.key(clip))
        if entry is None or not (any_text or entry["instead_of"] == clip["text"]):
            return None
        return entry["text"]

    def save(self) -> None:
        if self.entries or self.path.is_file():
            write_json(self.path, [entry for _, entry in sorted(self.entries.items())])
