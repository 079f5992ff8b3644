"""What became of each recording of a data set: one record in `.prepared/` for each.

A record is written when a recording's clips are all in place: it is what makes preparing resumable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fish_speech.datasets.clips import REJECTED
from fish_speech.files import (
    AUDIO_SUFFIXES,
    read_json,
    read_text,
    shown_path,
    write_json,
    write_text,
)
from fish_speech.preparation.corrections import Corrections
from fish_speech.preparation.entries import ClipEntry, SkippedEntry
from fish_speech.preparation.job import RecordingJob
from fish_speech.preparation.sources import RECORDS, Recording, has_vanished, printable

STAGING = f"{RECORDS}/.tmp-clips"  # in the data set: clips that are written and not yet committed
_DELETED = "was deleted"

Key = tuple[str, str]  # (speaker, name), casefolded: file systems may not tell cases apart


@dataclass
class Record:
    """What became of one recording.

    The entries in `clips` have no flags yet; `failure` says why nothing of it could be used;
    `recipe` is its job's fingerprint. `scripted`: its texts are those of a transcript beside it,
    whose `encoding` is there where it was guessed. `language` is what a recogniser listened for,
    where that was given or detected. `pending` are the files of old and new clips while these
    change places: a run that ends then leaves some of both.
    """

    speaker: str
    name: str
    source: str
    address: str
    digest: str
    recipe: str
    duration: float = 0.0
    failure: str | None = None
    clips: list[ClipEntry] = field(default_factory=list)
    skipped: list[SkippedEntry] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    scripted: bool = False
    encoding: str | None = None
    language: str | None = None
    pending: list[str] = field(default_factory=list)


class RecordStore:
    """The records of the data set at `folder`; `failures` are those of this run.

    A recording keeps its old clips until the new ones are complete: these are written under
    `STAGING`, and `commit` puts them in the place of the old ones.
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
        self._any_clip_exists = any(
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

    def update_moved_paths(self, recordings: Iterable[Recording]) -> None:
        """Note where recordings are that were moved or renamed, lest they count as gone."""
        for recording in recordings:
            record = self.records.get(_key(recording.speaker, recording.name))
            if record and record.digest == recording.digest and has_vanished(record.address):
                record.address, record.source = recording.address, recording.source
                self._write(record)

    def has_clips(self, record: Record) -> bool:
        """Whether any clip of a recording is in the data set."""
        return self._any_exists(clip["file"] for clip in record.clips)

    def is_done(self, job: RecordingJob) -> bool:
        """Whether an earlier run did just that. A clip that was deleted since stays deleted,
        unless all are gone."""
        record = self.records.get(_key(job.recording.speaker, job.recording.name))
        return (
            record is not None
            and record.recipe == job.fingerprint
            and record.failure is None
            and not record.pending
            and (self._any_clip_exists or not record.clips)
        )

    def commit(self, record: Record) -> None:
        """Note what became of a recording, and put its staged clips in the place of the old ones.

        Where it failed, its old clips stay.
        """
        key = _key(record.speaker, record.name)
        old = self.records.get(key)
        own = _clip_files(old)
        self._note_corrections(old)
        if old is not None and old.digest == record.digest and self._any_clip_exists:
            self._drop_previously_deleted(record, old)
        if (conflict := self._conflicting_file(record, own)) is not None:
            record.failure = (
                f"a clip of it would take the place of {printable(shown_path(conflict))}, which is "
                "not known to be one: rename or delete that file and its .lab"
            )
            record.clips, record.skipped = [], []
        if record.failure is not None:
            self.failures[key] = record
            if self._any_exists(own):
                record.failure += "; its clips from before are kept"
                return
        # Which clips are dropped is written before the old ones go, lest a crash forget it.
        self._write(replace(record, clips=[], pending=sorted(own | _clip_files(record))))
        before = self._path_of(old or record)
        if before.exists() and not before.samefile(self._path_of(record)):  # in another case
            before.unlink()
        self._remove(own)
        for clip in record.clips:
            staged, accepted = self.folder / STAGING / clip["file"], self.folder / clip["file"]
            accepted.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged.with_suffix(".lab"), accepted.with_suffix(".lab"))
            os.replace(staged, accepted)
        self._apply_corrections(record, old)
        self.records[key] = record
        self._write(record)

    def clip_paths(self, file: str) -> tuple[Path, Path]:
        """Where a clip is if it is accepted, and if it is rejected."""
        return self.folder / file, self.folder / REJECTED / file

    def with_current_text(self, clip: ClipEntry) -> ClipEntry:
        """The entry of a clip with its text as it is on disk, which may have been corrected."""
        accepted, rejected = self.clip_paths(clip["file"])
        if (label := accepted.with_suffix(".lab")).is_file():
            return {**clip, "text": read_text(label).strip()}
        if rejected.is_file() and (note := rejected.with_suffix(".json")).is_file():
            return {**clip, "text": read_json(note).get("text", clip["text"])}
        return clip

    def prune(self) -> None:
        """Note clips that were deleted; drop recordings that are gone and have none any more.

        A failed recording is gone, too, where it succeeded since under another name, as a download
        does that had no title.
        """
        done = {(k[0], r.address) for k, r in self.records.items() if r.failure is None}
        for key, record in list(self.records.items()):
            deleted = self._note_deleted(record)
            is_mended = (
                record.failure is not None
                and key not in self.failures
                and (key[0], record.address) in done
            )
            files = _clip_files(record)
            if not self._any_exists(files) and (is_mended or has_vanished(record.address)):
                self._remove(files)
                self._path_of(self.records.pop(key)).unlink(missing_ok=True)
            elif deleted:
                self._write(record)

    def _conflicting_file(self, record: Record, own: set[str]) -> Path | None:
        """Audio that is in the place of a new clip and is not of the recording's `own` clips."""
        own = {file.casefold() for file in own}
        for clip in record.clips:
            if clip["file"].casefold() in own:
                continue
            accepted, rejected = self.clip_paths(clip["file"])
            for path in (rejected, *map(accepted.with_suffix, sorted(AUDIO_SUFFIXES))):
                if path.exists():
                    return path
        return None

    def _drop_previously_deleted(self, record: Record, old: Record) -> None:
        """Leave out those new clips whose speech is mostly of clips that were deleted by hand."""
        self._note_deleted(old)
        deleted = [part for part in old.skipped if _DELETED in part["reason"]]
        for clip in list(record.clips):
            shared = (
                min(clip["end"], part["end"]) - max(clip["start"], part["start"])
                for part in deleted
            )
            if max(shared, default=0.0) > 0.5 * (clip["end"] - clip["start"]):
                record.clips.remove(clip)
                record.skipped.append(_deleted_entry(clip))

    def _note_deleted(self, record: Record) -> bool:
        """Note which clips of a record were deleted; whether there are any."""
        deleted = [clip for clip in record.clips if not self._exists(clip["file"])]
        for clip in deleted:
            record.clips.remove(clip)
            record.skipped.append(_deleted_entry(clip))
        return bool(deleted)

    def _remove(self, files: set[str]) -> None:
        """Remove these clips, whether accepted or rejected."""
        for file in files:
            accepted, rejected = self.clip_paths(file)
            for path in (
                *(accepted, accepted.with_suffix(".lab")),
                *(rejected, rejected.with_suffix(".json")),
            ):
                path.unlink(missing_ok=True)

    def _note_corrections(self, old: Record | None) -> None:
        """Keep what was corrected in the texts of a recording before its clips are made anew."""
        if old is None:
            return
        for clip in old.clips:
            self.corrections.note(clip, self.with_current_text(clip)["text"])
        self.corrections.save()

    def _apply_corrections(self, record: Record, old: Record | None) -> None:
        """Give new clips the texts that were corrected in the clips before them."""
        fitting = []
        for clip in record.clips:
            entry = self.corrections.find(clip, any_text=not record.scripted)
            if entry is not None:
                write_text(self.folder / Path(clip["file"]).with_suffix(".lab"), entry["text"])
                fitting.append(entry)
        for clip in old.clips if old is not None else ():
            entry = self.corrections.find_exact(clip)
            if entry is not None and entry not in fitting:
                self.say(
                    f"the text {entry['text'][:60]!r} that {clip['file']} was given by hand "
                    f"fits no clip any more; it is kept in {self.corrections.path}"
                )

    def _write(self, record: Record) -> None:
        write_json(self._path_of(record), asdict(record))

    def _path_of(self, record: Record) -> Path:
        return self.folder / RECORDS / record.speaker / f"{record.name}.json"

    def _exists(self, file: str) -> bool:
        return any(path.is_file() for path in self.clip_paths(file))

    def _any_exists(self, files: Iterable[str]) -> bool:
        return any(map(self._exists, files))


def _deleted_entry(clip: ClipEntry) -> SkippedEntry:
    span = {name: clip[name] for name in ("source", "start", "end")}
    return {**span, "reason": f"its clip {clip['file']} {_DELETED}"}


def _key(speaker: str, name: str) -> Key:
    return speaker.casefold(), name.casefold()


def _clip_files(record: Record | None) -> set[str]:
    """The clips that are in the data set because of a recording, or may be."""
    return {clip["file"] for clip in record.clips} | {*record.pending} if record else set()
