"""The books of a data set: one record for each recording, and the summary composed of them.

A record is written when a recording's clips are all in place: it is what makes preparing resumable.
The summary is a function of the records alone, so it is the same however often a run broke off.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_speech.datasets.clips import REJECTED
from fish_speech.files import (
    AUDIO_SUFFIXES,
    read_json,
    read_text,
    shown_path,
    write_json,
    write_text,
)
from fish_speech.preparation import quality
from fish_speech.preparation.corrections import Corrections
from fish_speech.preparation.sources import (
    RECORDS,
    SUMMARY_NAME,
    has_vanished,
    printable,
)

if TYPE_CHECKING:
    from fish_speech.preparation.clips import Job
    from fish_speech.preparation.sources import Recording

FRESH = f"{RECORDS}/.tmp-clips"  # in the data set: clips that are made and not yet entered
_DELETED = "was deleted"

Key = tuple[str, str]  # (speaker, name), casefolded: file systems may not tell cases apart


@dataclass
class Record:
    """What became of one recording.

    `clips` and `skipped` are entries of the summary, the clips yet without flags; `failure` says
    why nothing of it could be used; `recipe` tells what it was made with. `scripted`: its texts are
    those of a transcript beside it, whose `encoding` is there where it was guessed. `language` is
    what a recogniser was to hear, where that was told or found out. `pending` are the files of old
    and new clips while these change places: a run that ends then leaves some of both.
    """

    speaker: str
    name: str
    source: str
    address: str
    digest: str
    recipe: str
    duration: float = 0.0
    failure: str | None = None
    clips: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    scripted: bool = False
    encoding: str | None = None
    language: str | None = None
    pending: list[str] = field(default_factory=list)


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
    """The records of the data set at `folder`; `failures` are those of this run.

    What a recording became stays until it has become something else: clips are made under `FRESH`
    and change places with the old ones when all are there.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda message: None) -> None:
        self.folder, self.say = folder, say
        self.records: dict[Key, Record] = {}
        self.failures: dict[Key, Record] = {}
        for path in sorted((folder / RECORDS).glob("*/*.json")):
            try:
                record = Record(**read_json(path))
            except (TypeError, ValueError):
                continue  # of another version: its recording is prepared anew
            self.records[_key(record.speaker, record.name)] = record
        self._any_clip_is_there = any(
            record.pending or self.has_clips(record) for record in self.records.values()
        )
        self.corrections = Corrections(folder / "corrections.json")

    def owners(self) -> dict[Key, tuple[str, str, str]]:
        """(address, digest, name) of the recording that holds each name, and has clips or had."""
        return {
            key: (record.address, record.digest, record.name)
            for key, record in self.records.items()
            if record.failure is None
        }

    def follow(self, recordings: Iterable[Recording]) -> None:
        """Note where recordings are that were moved or renamed, lest they count as gone."""
        for recording in recordings:
            record = self.records.get(_key(recording.speaker, recording.name))
            if record and record.digest == recording.digest and has_vanished(record.address):
                record.address, record.source = recording.address, recording.source
                self._write(record)

    def has_clips(self, record: Record) -> bool:
        """Whether any clip of a recording is in the data set."""
        return any(map(self._is_there, record.clips))

    def is_done(self, job: Job) -> bool:
        """Whether an earlier run did just that. A clip that was deleted since stays away, unless
        all are gone."""
        record = self.records.get(_key(job.recording.speaker, job.recording.name))
        return (
            record is not None
            and record.recipe == job.recipe
            and record.failure is None
            and not record.pending
            and (self._any_clip_is_there or not record.clips)
        )

    def enter(self, record: Record) -> None:
        """Note what became of a recording. Where it failed, clips that it has from before stay."""
        key = _key(record.speaker, record.name)
        old = self.records.get(key)
        own = _files_of(old)
        self._note_corrections(old)
        if old is not None and old.digest == record.digest and self._any_clip_is_there:
            self._keep_away(record, old)
        if (foreign := self._foreign(record, own)) is not None:
            record.failure = (
                f"a clip of it would take the place of {printable(shown_path(foreign))}, which is "
                "not known to be one: rename or delete that file and its .lab"
            )
            record.clips, record.skipped = [], []
        if record.failure is not None:
            self.failures[key] = record
            if self._any_is_there(own):
                record.failure += "; its clips from before are kept"
                return
        # What was kept away is on the books before the old clips go, lest a crash forget it.
        self._write(replace(record, clips=[], pending=sorted(own | _files_of(record))))
        before = self._path_of(old or record)
        if before.exists() and not before.samefile(self._path_of(record)):  # in another case
            before.unlink()
        self._remove(own)
        for clip in record.clips:
            fresh, home = self.folder / FRESH / clip["file"], self.folder / clip["file"]
            home.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh.with_suffix(".lab"), home.with_suffix(".lab"))
            os.replace(fresh, home)
        self._correct(record, old)
        self.records[key] = record
        self._write(record)

    def _foreign(self, record: Record, own: set[str]) -> Path | None:
        """Sound that is in the place of a new clip and is not of the recording's `own` clips."""
        own = {file.casefold() for file in own}
        for clip in record.clips:
            if clip["file"].casefold() in own:
                continue
            home, away = self._places(clip)
            for path in (away, *map(home.with_suffix, sorted(AUDIO_SUFFIXES))):
                if path.exists():
                    return path
        return None

    def _keep_away(self, record: Record, old: Record) -> None:
        """Leave out those new clips whose speech is mostly of clips that were deleted by hand."""
        self._forget_deleted(old)
        deleted = [part for part in old.skipped if _DELETED in part["reason"]]
        for clip in list(record.clips):
            shared = (
                min(clip["end"], part["end"]) - max(clip["start"], part["start"])
                for part in deleted
            )
            if max(shared, default=0.0) > 0.5 * (clip["end"] - clip["start"]):
                record.clips.remove(clip)
                record.skipped.append(_deleted(clip))

    def _remove(self, files: set[str]) -> None:
        """Remove these clips, wherever they are."""
        for file in files:
            home, away = self._places({"file": file})
            for path in (home, home.with_suffix(".lab"), away, away.with_suffix(".json")):
                path.unlink(missing_ok=True)

    def compose(
        self, thresholds: quality.Thresholds, shortest: float, *, drop_flagged: bool = False
    ) -> Summary:
        """Make the summary of all records and write it.

        Transcripts are read back from the `.lab` files, so that corrections made there count. With
        `drop_flagged` the clips with flags are moved to `rejected/`, without it they come back.
        """
        self._forget_what_was_taken_away()
        clips = [clip for _, record in sorted(self.records.items()) for clip in record.clips]
        clips = [quality.judged(self._with_text(clip), thresholds, shortest) for clip in clips]
        kept, rejected = [], []
        for clip in quality.mark_twins(clips):
            (rejected if self._settle(clip, drop_flagged) else kept).append(clip)
        summary = Summary(kept, *self._accounts(rejected), failed=len(self.failures))
        write_json(self.folder / SUMMARY_NAME, summary.as_json())
        shutil.rmtree(self.folder / FRESH, ignore_errors=True)
        return summary

    def _write(self, record: Record) -> None:
        write_json(self._path_of(record), asdict(record))

    def _path_of(self, record: Record) -> Path:
        return self.folder / RECORDS / record.speaker / f"{record.name}.json"

    def _places(self, clip: dict[str, Any]) -> tuple[Path, Path]:
        return self.folder / clip["file"], self.folder / REJECTED / clip["file"]

    def _is_there(self, clip: dict[str, Any]) -> bool:
        return any(path.is_file() for path in self._places(clip))

    def _any_is_there(self, files: set[str]) -> bool:
        return any(self._is_there({"file": file}) for file in files)

    def _with_text(self, clip: dict[str, Any]) -> dict[str, Any]:
        """The entry of a clip with its text as it is on disk, which may have been corrected."""
        home, away = self._places(clip)
        if (label := home.with_suffix(".lab")).is_file():
            return {**clip, "text": read_text(label).strip()}
        if away.is_file() and (note := away.with_suffix(".json")).is_file():
            return {**clip, "text": read_json(note).get("text", clip["text"])}
        return clip

    def _note_corrections(self, old: Record | None) -> None:
        """Keep what was corrected in the texts of a recording before its clips are made anew."""
        if old is None:
            return
        for clip in old.clips:
            self.corrections.note(clip, self._with_text(clip)["text"])
        self.corrections.save()

    def _correct(self, record: Record, old: Record | None) -> None:
        """Give new clips the texts that were corrected in the clips before them."""
        fitting = []
        for clip in record.clips:
            entry = self.corrections.find(clip, any_text=not record.scripted)
            if entry is not None:
                write_text(self.folder / Path(clip["file"]).with_suffix(".lab"), entry["text"])
                fitting.append(entry)
        for clip in old.clips if old is not None else ():
            entry = self.corrections.at(clip)
            if entry is not None and entry not in fitting:
                self.say(
                    f"the text {entry['text'][:60]!r} that {clip['file']} was given by hand "
                    f"fits no clip any more; it is kept in {self.corrections.path}"
                )

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
            if not (label := home.with_suffix(".lab")).is_file():
                write_text(label, clip["text"])
            if away.is_file():
                os.replace(away, home)
            away.with_suffix(".json").unlink(missing_ok=True)
        return reject

    def _accounts(self, rejected: list[dict[str, Any]]) -> tuple[list, list, list]:
        """The lists `skipped`, `rejected` and `recordings`: where every second went."""
        skipped, recordings = [], []
        for key, record in sorted(self.records.items()):
            failed = self.failures.get(key, record)
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
                    "clips": len(record.clips),
                    "duration": record.duration,
                    "in_clips": round(in_clips, 3),
                    "left_out": round(left_out, 3),
                    "silence": round(max(0.0, record.duration - in_clips - left_out), 3),
                    **{name: value for name, value in about.items() if value},
                }
            )
        named = [
            {"file": f"{REJECTED}/{clip['file']}", "reason": ", ".join(clip["flags"])}
            for clip in rejected
        ]
        return skipped, named, recordings

    def _forget_what_was_taken_away(self) -> None:
        """Note clips that were deleted; drop recordings that are gone and have none any more.

        Gone is also what failed and was done since under another name, as a download that had none.
        """
        done = {(k[0], r.address) for k, r in self.records.items() if r.failure is None}
        for key, record in list(self.records.items()):
            deleted = self._forget_deleted(record)
            is_mended = (
                record.failure is not None
                and key not in self.failures
                and (key[0], record.address) in done
            )
            files = _files_of(record)
            if not self._any_is_there(files) and (is_mended or has_vanished(record.address)):
                self._remove(files)
                self._path_of(self.records.pop(key)).unlink(missing_ok=True)
            elif deleted:
                self._write(record)

    def _forget_deleted(self, record: Record) -> bool:
        """Note which clips of a record were deleted; whether there are any."""
        deleted = [clip for clip in record.clips if not self._is_there(clip)]
        for clip in deleted:
            record.clips.remove(clip)
            record.skipped.append(_deleted(clip))
        return bool(deleted)


def _deleted(clip: dict[str, Any]) -> dict[str, Any]:
    span = {name: clip[name] for name in ("source", "start", "end")}
    return {**span, "reason": f"its clip {clip['file']} {_DELETED}"}


def _key(speaker: str, name: str) -> Key:
    return speaker.casefold(), name.casefold()


def _files_of(record: Record | None) -> set[str]:
    """The clips that are in the data set because of a recording, or may be."""
    return {clip["file"] for clip in record.clips} | {*record.pending} if record else set()
