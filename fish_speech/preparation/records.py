"""What became of each recording of a dataset: one record in `.prepared/` for each.

A record is written when a recording's clips are all in place: it is what makes preparing resumable.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fish_speech.audio_decoding import wav_breaks_off
from fish_speech.console import error_message
from fish_speech.datasets.clips import REJECTED, SUMMARY_NAME
from fish_speech.files import (
    AUDIO_SUFFIXES,
    read_json,
    read_text,
    remove_temporaries,
    shown_path,
    write_json,
    write_text,
)
from fish_speech.preparation.corrections import Corrections
from fish_speech.preparation.entries import ClipEntry, SkippedEntry, has_type, is_inside, type_hints
from fish_speech.preparation.job import RecordingJob
from fish_speech.preparation.sources import (
    RECORDS,
    Recording,
    has_vanished,
    printable,
)
from fish_speech.text import is_speakable

_CORRECTIONS = "corrections.json"
_TOP_FILES = (SUMMARY_NAME, _CORRECTIONS, "report.html", "codes.json")  # of prepare and extract
STAGING = f"{RECORDS}/.tmp-clips"  # in the dataset: clips that are written and not yet committed
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
    """The records of the dataset at `folder`; `failures` are those of this run.

    A recording keeps its old clips until the new ones are complete: these are written under
    `STAGING`, and `commit` puts them in the place of the old ones.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda message: None) -> None:
        self.folder, self.say = folder, say
        self.records: dict[Key, Record] = {}
        self.failures: dict[Key, Record] = {}
        self._unreadable: dict[Key, list[str]] = {}  # the clips of a recording, as they are named
        for path in sorted((folder / RECORDS).glob("*/[!.]*.json")):
            try:
                record = _read_record(path)
            except ValueError as error:
                speaker, name = path.parent.name, path.stem
                self._unreadable[_key(speaker, name)] = self._find_clips(speaker, name)
                say(f"{error}; its recording is prepared anew, with the texts that its clips have")
                continue
            self.records[_key(record.speaker, record.name)] = record
        self._any_clip_exists = any(self._unreadable.values()) or any(
            record.pending or self.has_clips(record) for record in self.records.values()
        )
        self.corrections = Corrections(folder / _CORRECTIONS)

    def remove_leftovers(self) -> None:
        """Remove what killed runs left where only holders of the dataset's lock write."""
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        remove_temporaries(self.folder, _TOP_FILES)
        speakers = {record.speaker for record in self.records.values()}
        for folder in (RECORDS, REJECTED, *speakers):
            remove_temporaries(self.folder / folder)

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
        """Whether any clip of a recording is in the dataset."""
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
            and not any(self.is_damaged(clip["file"]) for clip in record.clips)
        )

    def commit(self, record: Record) -> None:
        """Note what became of a recording, and put its staged clips in the place of the old ones.

        Where it failed, its old clips stay.
        """
        key = _key(record.speaker, record.name)
        old = self.records.get(key)
        own = _clip_files(old) | {*self._unreadable.get(key, ())}
        try:
            self._note_corrections(old)
            self._note_texts(record, self._unreadable.get(key, []))
        except ValueError as error:
            record.failure = record.failure or str(error)
            record.clips, record.skipped = [], []
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
        self._unreadable.pop(key, None)
        self._write(record)

    def clip_paths(self, file: str) -> tuple[Path, Path]:
        """Where a clip is if it is accepted, and if it is rejected."""
        return self.folder / file, self.folder / REJECTED / file

    def with_current_text(self, clip: ClipEntry) -> ClipEntry:
        """The entry of a clip with its text as it is on disk, which may have been corrected.

        A text without a letter or a number is no correction: the text from before is put back.
        Raises `ValueError` that names the file where it can't be read.
        """
        text = self._text_on_disk(clip["file"])
        if text is None or text == clip["text"]:
            return clip
        if is_speakable(text):
            return {**clip, "text": text}
        label = self.clip_paths(clip["file"])[0].with_suffix(".lab")
        if label.is_file():
            write_text(label, clip["text"])
            self.say(f"{label}: has no letter in it; the text from before is put back")
        return clip

    def is_damaged(self, file: str) -> bool:
        """Whether a clip is there, but without sound or only in part."""
        paths = [path for path in self.clip_paths(file) if path.is_file()]
        return bool(paths) and all(map(wav_breaks_off, paths))

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
            if (label := accepted.with_suffix(".lab")).is_dir():
                return label
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

    def _note_texts(self, record: Record, files: list[str]) -> None:
        """Keep the texts of clips whose record can't be read, where the new clips differ.

        What they were cut from isn't known: only a new clip of as many samples is the same one.
        Raises `ValueError` where a text fits no new clip, rather than lose it.
        """
        if record.failure is not None:
            return
        clips = {clip["file"].casefold(): clip for clip in record.clips}
        for file in files:
            text, clip = self._text_on_disk(file), clips.get(file.casefold())
            if text is None or not is_speakable(text):
                continue
            sizes = {p.stat().st_size for p in self.clip_paths(file) if p.is_file()}
            if clip is None or (self.folder / STAGING / clip["file"]).stat().st_size not in sizes:
                raise ValueError(
                    f"its record can't be read, and the text of {self.clip_paths(file)[0]} fits no "
                    "clip of these options: take those of before, or move that clip away"
                )
            if text != clip["text"]:
                self.corrections.note(clip, text)
                self.say(f"the text {text[:60]!r} of {file} is kept, as corrected by hand")
        self.corrections.save()

    def _find_clips(self, speaker: str, name: str) -> list[str]:
        """The files that are named as a recording's clips, accepted and rejected."""
        numbered = re.compile(rf"{re.escape(name)}_\d{{4,}}\.wav")
        found = (
            path.name
            for folder in self.clip_paths(speaker)
            for path in folder.glob("*.wav")
            if numbered.fullmatch(path.name)
        )
        return [f"{speaker}/{file}" for file in sorted(set(found))]

    def _text_on_disk(self, file: str) -> str | None:
        """The text beside a clip, or in the note of a rejected one; None where there is none.

        Raises `ValueError` that names the file where it can't be read.
        """
        accepted, rejected = self.clip_paths(file)
        label, note = accepted.with_suffix(".lab"), rejected.with_suffix(".json")
        try:
            if label.exists():
                return read_text(label).strip()
            entry = read_json(note) if rejected.is_file() and note.is_file() else {}
        except OSError as error:  # such as a folder in its place
            raise ValueError(error_message(error)) from error
        if not has_type(entry, dict) or not has_type(entry.get("text"), str | None):
            raise ValueError(f"{note}: not the note of a rejected clip; delete it")
        return entry.get("text")

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


def _read_record(path: Path) -> Record:
    """Read a record. Raises `ValueError` that names it where it is none of ours.

    Keys of other versions are left out.
    """
    values = read_json(path)
    hints = type_hints(Record)
    try:
        values = {name: value for name, value in values.items() if name in hints}
        record = Record(**values)
    except (AttributeError, TypeError):
        record = None
    if record is None or not all(has_type(getattr(record, name), hints[name]) for name in hints):
        raise ValueError(f"{path}: not a record of this program")
    names = [f"{record.speaker}/{record.name}", *_clip_files(record)]
    if not all(map(is_inside, names)):
        raise ValueError(f"{path}: names files outside the dataset")
    return record


def _deleted_entry(clip: ClipEntry) -> SkippedEntry:
    span = {name: clip[name] for name in ("source", "start", "end")}
    return {**span, "reason": f"its clip {clip['file']} {_DELETED}"}


def _key(speaker: str, name: str) -> Key:
    return speaker.casefold(), name.casefold()


def _clip_files(record: Record | None) -> set[str]:
    """The clips that are in the dataset because of a recording, or may be."""
    return {clip["file"] for clip in record.clips} | {*record.pending} if record else set()
