"""Texts that were corrected by hand in `.lab` files, by the seconds of their recording.

They outlive the clips, which other options cut or name differently.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from pathlib import Path

from fish_speech.files import read_json, write_json
from fish_speech.preparation.entries import ClipEntry, CorrectionEntry, has_type
from fish_speech.text import is_speakable


class Corrections:
    """The corrections of a dataset, in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self._changed = path, False
        self._entries: dict[str, list[CorrectionEntry]] = defaultdict(list)  # of each recording
        entries = read_json(path) if path.is_file() else []
        if not has_type(entries, list[CorrectionEntry]):
            raise ValueError(
                f"{path}: not the corrections that were kept here; mend it or put back a copy "
                "(without it, what it held is not put into clips that are made anew)"
            )
        for entry in entries:
            if is_speakable(entry["text"]):  # earlier versions took emptied files for corrections
                self._entries[_recording(entry)].append(entry)

    def note(self, clip: ClipEntry, text: str) -> None:
        """Remember the `text` of a clip, if it isn't the one that the clip was made with."""
        known = self.find(clip), self.find_exact(clip)
        entries = self._entries[_recording(clip)]
        old, new = [entry for entry in entries if entry in known], []
        if text != clip["text"]:
            about = {name: clip[name] for name in ("file", "source", "start", "end")}
            new.append({**about, "text": text, "instead_of": clip["text"]})
        if old or new:
            entries[:] = [entry for entry in entries if entry not in known] + new
            self._changed |= old != new

    def find(self, clip: ClipEntry, *, any_text: bool = False) -> CorrectionEntry | None:
        """The correction of a clip's text, however it was cut then; None where there is none.

        With `any_text` one of exactly its seconds counts too, whatever the text was.
        """
        for entry in self._entries[_recording(clip)]:
            overlaps = entry["start"] < clip["end"] and clip["start"] < entry["end"]
            if entry["instead_of"] == clip["text"] and overlaps:
                return entry
        return self.find_exact(clip) if any_text else None

    def find_exact(self, clip: ClipEntry) -> CorrectionEntry | None:
        """The correction of exactly a clip's seconds."""
        for entry in self._entries[_recording(clip)]:
            if (entry["start"], entry["end"]) == (clip["start"], clip["end"]):
                return entry
        return None

    def save(self) -> None:
        if self._changed:
            order = sorted(
                chain.from_iterable(self._entries.values()),
                key=lambda entry: (_recording(entry), entry["start"]),
            )
            write_json(self.path, order)
            self._changed = False


def _recording(clip: ClipEntry | CorrectionEntry) -> str:
    return clip["file"].rpartition("_")[0].casefold()  # the clip's number may change
