"""The books of a data set: one record for each recording, and the summary composed of them.

A record is written when a recording's clips are all in place: it is what makes preparing resumable.
The summary is a function of the records alone, so it is the same however often a run broke off.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json
from fish_speech.preparation.quality import Thresholds, flags
from fish_speech.preparation.sources import SUMMARY_NAME

RECORDS = ".prepared"


@dataclass
class Record:
    """What became of one recording. `clips` and `skipped` are entries of the summary, yet without
    flags; `failure` says why nothing of it could be used; `recipe` tells what it was made with."""

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
    """What `dataset_summary.json` says, and how many inputs of this run `failed`."""

    clips: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
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
            "recordings": self.recordings,
        }


class Books:
    """The records of the data set at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[tuple[str, str], Record] = {}
        for path in sorted((folder / RECORDS).glob("*/*.json")):
            try:
                record = Record(**read_json(path))
            except (TypeError, ValueError):
                continue  # of another version: its recording is prepared anew
            self.records[record.speaker.casefold(), record.name.casefold()] = record

    def owners(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(source, digest) of the recording that holds each (speaker, name)."""
        return {key: (record.source, record.digest) for key, record in self.records.items()}

    def find(self, speaker: str, name: str) -> Record | None:
        return self.records.get((speaker.casefold(), name.casefold()))

    def is_done(self, speaker: str, name: str, recipe: str) -> bool:
        """Whether an earlier run did just that and all its clips are still there."""
        record = self.find(speaker, name)
        return (
            record is not None
            and record.recipe == recipe
            and record.failure is None
            and all(self.clip_path(clip).is_file() for clip in record.clips)
        )

    def clip_path(self, clip: dict[str, Any]) -> Path:
        return self.folder / clip["file"]

    def forget(self, speaker: str, name: str) -> None:
        """Remove a recording's record, then its clips: before it is prepared in another way."""
        record = self.records.pop((speaker.casefold(), name.casefold()), None)
        if record is None:
            return
        (self.folder / RECORDS / record.speaker / f"{record.name}.json").unlink(missing_ok=True)
        for clip in record.clips:
            for path in (self.clip_path(clip), self.clip_path(clip).with_suffix(".lab")):
                path.unlink(missing_ok=True)

    def enter(self, record: Record) -> None:
        self.records[record.speaker.casefold(), record.name.casefold()] = record
        write_json(
            self.folder / RECORDS / record.speaker / f"{record.name}.json", asdict(record)
        )

    def compose(self, thresholds: Thresholds) -> Summary:
        """Make the summary of all records and write it."""
        clips, skipped, recordings = [], [], []
        for _, record in sorted(self.records.items()):
            clips += [{**clip, "flags": flags(clip, thresholds)} for clip in record.clips]
            if record.failure is not None:
                skipped.append({"source": record.source, "reason": record.failure})
            skipped += record.skipped
            recordings.append(
                {
                    "source": record.source,
                    "speaker": record.speaker,
                    "duration": record.duration,
                    "in_clips": round(sum(clip["end"] - clip["start"] for clip in record.clips), 3),
                    **({"origin": record.origin} if record.origin else {}),
                }
            )
        summary = Summary(clips, skipped, recordings)
        write_json(self.folder / SUMMARY_NAME, summary.as_json())
        return summary
