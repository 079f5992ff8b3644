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
        self.entries: list[dict[str, Any]] = read_json(path) if path.is_file() else []

    def note(self, clip: dict[str, Any], text: str) -> None:
        """Remember the `text` of a clip, if it isn't the one that the clip was made with."""
        known = self.find(clip)
        self.entries = [entry for entry in self.entries if entry not in (known, self.at(clip))]
        if text != clip["text"]:
            about = {name: clip[name] for name in ("file", "source", "start", "end")}
            self.entries.append({**about, "text": text, "instead_of": clip["text"]})

    def find(self, clip: dict[str, Any], *, any_text: bool = False) -> dict[str, Any] | None:
        """The correction of a clip's text, wherever it was cut then; None where there is none.

        With `any_text` one of just its seconds counts, whatever the text was.
        """
        for entry in self.entries:
            overlaps = entry["start"] < clip["end"] and clip["start"] < entry["end"]
            same = entry["instead_of"] == clip["text"] and overlaps
            if same and _recording(entry) == _recording(clip):
                return entry
        return self.at(clip) if any_text else None

    def at(self, clip: dict[str, Any]) -> dict[str, Any] | None:
        """The correction of just a clip's seconds."""
        place = _recording(clip), clip["start"], clip["end"]
        for entry in self.entries:
            if (_recording(entry), entry["start"], entry["end"]) == place:
                return entry
        return None

    def save(self) -> None:
        if self.entries or self.path.is_file():
            order = sorted(self.entries, key=lambda entry: (_recording(entry), entry["start"]))
            write_json(self.path, order)


def _recording(clip: dict[str, Any]) -> str:
    return clip["file"].rpartition("_")[0].casefold()  # the clip's number may change
