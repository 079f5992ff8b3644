"""The books of a data set: one record for each recording, and the summary composed of them.

A record is written when a recording's clips are all in place: it is what makes preparing resumable.
The summary is a function of the records alone, so it is the same however often a run broke off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_speech.files import read_json, read_text, write_json, write_text
from fish_speech.preparation import quality
from fish_speech.preparation.sources import REJECTED, SUMMARY_NAME

if TYPE_CHECKING:
    from fish_speech.preparation.clips import Job

RECORDS = ".prepared"
_CLIP_FILE = re.compile(r"(.+)_\d{4,}\.(wav|lab|json)")

Key = tuple[str, str]  # (speaker, name), casefolded: file systems may not tell cases apart


@dataclass
class Record:
    """What became of one recording.

    `clips` and `skipped` are entries of the summary, the clips yet without flags; `failure` says
    why nothing of it could be used; `recipe` tells what it was made with.
    """

    speaker: str
    name: str
    source: str
    digest: str
    recipe: str
    duration: float = 0.0
    failure: str | None = None
    clips: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What `dataset_summary.json` says; `failed` inputs of the run that made it."""

    clips: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    recordings: list[dict[str, Any]]
    failed: int = 0

    @property
    def speakers(self) -> list[str]:
        return sorted({clip["speaker"] for clip in self.clips})

    @property
    def minutes(self) -> float:
        return round(sum(clip["duration"] for clip in self.clips) / 60, 2)

    def as_json(self) -> dict[str, Any]:
        return {
            "total_files": len(self.clips),
            "total_duration_minutes": self.minutes,
            "speakers": self.speakers,
            "clips": self.clips,
            "skipped": self.skipped,
            "rejected": self.rejected,
            "recordings": self.recordings,
        }


class Books:
    """The records of the data set at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[Key, Record] = {}
        for path in sorted((folder / RECORDS).glob("*/*.json")):
            try:
                record = Record(**read_json(path))
            except (TypeError, ValueError):
                continue  # of another version: its recording is prepared anew
            self.records[_key(record.speaker, record.name)] = record

    def owners(self) -> dict[Key, tuple[str, str]]:
        """(source, digest) of the recording that holds each name."""
        return {key: (record.source, record.digest) for key, record in self.records.items()}

    def find(self, speaker: str, name: str) -> Record | None:
        return self.records.get(_key(speaker, name))

    def is_done(self, job: Job) -> bool:
        """Whether an earlier run did just that and all its clips are still there."""
        record = self.find(job.recording.speaker, job.recording.name)
        return (
            record is not None
            and record.recipe == job.recipe
            and record.failure is None
            and all(any(path.is_file() for path in self._places(clip)) for clip in record.clips)
        )

    def enter(self, record: Record) -> None:
        self.records[_key(record.speaker, record.name)] = record
        write_json(self.folder / RECORDS / record.speaker / f"{record.name}.json", asdict(record))

    def clear(self, names: Iterable[tuple[str, str]]) -> None:
        """Remove what stands under these names (speaker, name), finished or left half done."""
        keys = {_key(*name) for name in names}
        for key in keys & self.records.keys():
            record = self.records.pop(key)
            (self.folder / RECORDS / record.speaker / f"{record.name}.json").unlink(missing_ok=True)
        for speaker in {key[0] for key in keys}:
            for parent in (self.folder, self.folder / REJECTED):
                for path in _clips_of(parent, speaker, keys):
                    path.unlink()

    def compose(self, thresholds: quality.Thresholds, *, drop_flagged: bool = False) -> Summary:
        """Make the summary of all records and write it.

        Transcripts are read back from the `.lab` files, so that corrections made there count. With
        `drop_flagged` the clips with flags are moved to `rejected/`, without it they come back.
        """
        self._drop_vanished_failures()
        clips = [clip for _, record in sorted(self.records.items()) for clip in record.clips]
        clips = [quality.judged(self._with_text(clip), thresholds) for clip in clips]
        kept, rejected = [], []
        for clip in quality.mark_twins(clips):
            (rejected if self._settle(clip, drop_flagged) else kept).append(clip)
        summary = Summary(kept, *self._accounts(rejected))
        write_json(self.folder / SUMMARY_NAME, summary.as_json())
        return summary

    def _places(self, clip: dict[str, Any]) -> tuple[Path, Path]:
        return self.folder / clip["file"], self.folder / REJECTED / clip["file"]

    def _with_text(self, clip: dict[str, Any]) -> dict[str, Any]:
        label = self._places(clip)[0].with_suffix(".lab")
        if not label.is_file():
            return clip
        return {**clip, "text": read_text(label).strip()}

    def _settle(self, clip: dict[str, Any], drop_flagged: bool) -> bool:
        """Put a clip where it belongs; true where that is `rejected/`. Any crash can be redone."""
        home, away = self._places(clip)
        reject = drop_flagged and bool(clip["flags"])
        if reject:
            if home.is_file():
                write_json(away.with_suffix(".json"), {"reason": ", ".join(clip["flags"]), **clip})
                os.replace(home, away)
            home.with_suffix(".lab").unlink(missing_ok=True)
        else:
            if away.is_file():
                write_text(home.with_suffix(".lab"), clip["text"])
                os.replace(away, home)
            away.with_suffix(".json").unlink(missing_ok=True)
        return reject

    def _accounts(self, rejected: list[dict[str, Any]]) -> tuple[list, list, list]:
        """The lists `skipped`, `rejected` and `recordings`: where every second went."""
        skipped, recordings = [], []
        for _, record in sorted(self.records.items()):
            if record.failure is not None:
                skipped.append({"source": record.source, "reason": record.failure})
            skipped += record.skipped
            in_clips = sum(clip["end"] - clip["start"] for clip in record.clips)
            left_out = sum(part["end"] - part["start"] for part in record.skipped)
            recordings.append(
                {
                    "source": record.source,
                    "speaker": record.speaker,
                    "clips": len(record.clips),
                    "duration": record.duration,
                    "in_clips": round(in_clips, 3),
                    "left_out": round(left_out, 3),
                    "silence": round(max(0.0, record.duration - in_clips - left_out), 3)
                    if record.failure is None
                    else 0.0,
                    **({"origin": record.origin} if record.origin else {}),
                }
            )
        named = [
            {"file": f"{REJECTED}/{clip['file']}", "reason": ", ".join(clip["flags"])}
            for clip in rejected
        ]
        return skipped, named, recordings

    def _drop_vanished_failures(self) -> None:
        """Forget failures of files that the user has taken away since."""
        for key, record in list(self.records.items()):
            if (
                record.failure is not None
                and not record.origin
                and not os.path.lexists(record.source)
            ):
                self.clear([key])


def _key(speaker: str, name: str) -> Key:
    return speaker.casefold(), name.casefold()


def _clips_of(parent: Path, speaker: str, keys: set[Key]) -> list[Path]:
    """The files under `parent` that are clips of recordings among `keys` by this speaker."""
    if not parent.is_dir():
        return []
    return [
        path
        for folder in parent.iterdir()
        if folder.is_dir() and folder.name.casefold() == speaker
        for path in folder.iterdir()
        if (found := _CLIP_FILE.fullmatch(path.name)) and _key(speaker, found[1]) in keys
    ]
