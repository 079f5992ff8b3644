"""`dataset_summary.json`: every clip of a dataset with its figures, and what was left out and why.

It is a function of the records alone, so it is the same however often a run broke off.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Any

from fish_speech.datasets.clips import REJECTED, SUMMARY_NAME
from fish_speech.files import write_json, write_text
from fish_speech.preparation import quality
from fish_speech.preparation.entries import ClipEntry, SkippedEntry
from fish_speech.preparation.options import Thresholds
from fish_speech.preparation.records import STAGING, RecordStore


@dataclass(frozen=True)
class Summary:
    """What `dataset_summary.json` says; `failed` inputs of the run that made it."""

    clips: list[ClipEntry]
    skipped: list[SkippedEntry]
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


def write_summary(
    store: RecordStore,
    thresholds: Thresholds,
    min_duration: float,
    *,
    drop_flagged: bool = False,
) -> Summary:
    """Make the summary of all records and write it.

    Transcripts are read back from the `.lab` files, so that corrections made there count. With
    `drop_flagged` the clips with flags are moved to `rejected/`, without it they come back.
    """
    store.prune()
    clips, unusable = [], []
    for clip in (clip for _, record in sorted(store.records.items()) for clip in record.clips):
        try:
            if store.is_damaged(clip["file"]):
                raise ValueError("it breaks off; delete it, or prepare its recording again")
            clip = store.with_current_text(clip)
        except ValueError as error:
            reason = f"its clip {clip['file']} can't be used: {error}"
            unusable.append({"source": clip["source"], "reason": reason})
            continue
        clips.append(quality.with_flags(clip, thresholds, min_duration))
    accepted, rejected = [], []
    for clip in quality.mark_near_duplicates(clips):
        reject = drop_flagged and bool(clip["flags"])
        _accept_or_reject(store, clip, reject)
        (rejected if reject else accepted).append(clip)
    skipped, *lists = _summary_lists(store, rejected)
    failed = len(store.failures) + len(unusable)
    summary = Summary(accepted, [*skipped, *unusable], *lists, failed=failed)
    write_json(store.folder / SUMMARY_NAME, summary.as_json())
    shutil.rmtree(store.folder / STAGING, ignore_errors=True)
    return summary


def _accept_or_reject(store: RecordStore, clip: ClipEntry, reject: bool) -> None:
    """Move a clip where it belongs. After a crash at any point it can be done again."""
    accepted, rejected = store.clip_paths(clip["file"])
    if reject:
        if accepted.is_file():
            write_json(rejected.with_suffix(".json"), {"reason": ", ".join(clip["flags"]), **clip})
            os.replace(accepted, rejected)
        accepted.with_suffix(".lab").unlink(missing_ok=True)
    else:
        if not (label := accepted.with_suffix(".lab")).is_file():
            write_text(label, clip["text"])
        if rejected.is_file():
            os.replace(rejected, accepted)
        rejected.with_suffix(".json").unlink(missing_ok=True)


def _summary_lists(store: RecordStore, rejected: list[ClipEntry]) -> tuple[list, list, list]:
    """The lists `skipped`, `rejected` and `recordings`: where every second went."""
    skipped, recordings = [], []
    for key, record in sorted(store.records.items()):
        failed = store.failures.get(key, record)
        if failed.failure is not None:
            skipped.append({"source": failed.source, "reason": failed.failure})
        skipped += record.skipped
        in_clips = sum(clip["end"] - clip["start"] for clip in record.clips)
        left_out = sum(part["end"] - part["start"] for part in record.skipped if "end" in part)
        if record.failure is not None:
            left_out = record.duration
        about = {name: getattr(record, name) for name in ("language", "encoding", "origin")}
        recordings.append(
            {
                "source": record.source,
                "speaker": record.speaker,
                "digest": record.digest,
                "clips": len(record.clips),
                "duration": record.duration,
                "in_clips": round(in_clips, 3),
                "left_out": round(left_out, 3),
                "silence": round(max(0.0, record.duration - in_clips - left_out), 3),
                **{name: value for name, value in about.items() if value},
            }
        )
    for key, failed in sorted(store.failures.items()):
        if key not in store.records:  # whose own record can't be read
            skipped.append({"source": failed.source, "reason": failed.failure})
    named = [
        {"file": f"{REJECTED}/{clip['file']}", "reason": ", ".join(clip["flags"])}
        for clip in rejected
    ]
    return skipped, named, recordings
