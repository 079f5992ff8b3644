"""What there is to prepare: recordings, who speaks in them, and the transcripts beside them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from fish_speech.audio_decoding import audio_info
from fish_speech.console import shorten_list
from fish_speech.datasets.clips import REJECTED, SUMMARY_NAME, is_rejected
from fish_speech.files import (
    AUDIO_SUFFIXES,
    SIDECAR_SUFFIXES,
    file_digest,
    is_audio,
    list_files,
    safe_name,
    shown_path,
    sidecar_of,
)
from fish_speech.preparation import encodings

RECORDS = ".prepared"  # the folder of records in a dataset


@dataclass(frozen=True)
class Recording:
    """One input file. `name` is what its clips are called; `source` is what people know it as.

    `address` is unique, whatever folder a program is started in. `problem` says why it can't be
    used, where that is known before it is decoded. `transcript` is the text beside it, white space
    collapsed, or None; `encoding` is the text's where that was guessed. `prepared`: it is a clip of
    a dataset. `origin` holds a download's provenance.
    """

    path: Path
    source: str
    address: str
    speaker: str
    name: str = ""
    digest: str = ""
    transcript: str | None = None
    encoding: str | None = None
    problem: str | None = None
    prepared: bool = False
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputFile:
    """A file to prepare, before it has a name; fields as in `Recording`. It is in `data_set`."""

    path: Path
    speaker: str
    data_set: Path | None = None
    problem: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def is_clip(self) -> bool:
        return self.data_set is not None and _label_path(self.path).is_file()


def find_local(
    source: str | Path,
    speaker: str | None,
    default_speaker: str,
    *,
    exclude: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[InputFile]:
    """All audio at `source`, a file or a folder (its first subfolders are speakers).

    What lies under `exclude` is left out; `say` is told what else is no input. A folder that can't
    be read comes back with its `problem`. Raises `FileNotFoundError` where nothing is there,
    `ValueError` where nothing in it is audio.
    """
    source = Path(source)
    if os.path.isfile(source):  # pathlib raises for a name that is too long
        problem = None if is_audio(source) else _why_no_audio(source)
        return [InputFile(source, speaker or default_speaker, problem=problem)]
    if not os.path.isdir(source):
        raise FileNotFoundError(f"{source}: no such file or folder (for a web address, --youtube)")
    unreadable: list[OSError] = []
    files = list_files(source, unreadable.append)
    if exclude is not None:
        files = [path for path in files if not path.resolve().is_relative_to(exclude.resolve())]
    data_sets = {path: _data_set_of(path, source) for path in files}
    files = [
        path for path in files if not ((folder := data_sets[path]) and is_rejected(path, folder))
    ]
    folders = {path: _folder_of(path, data_sets[path] or source) for path in files}
    found = [
        InputFile(path, speaker or (safe_name(folders[path]) if folders[path] else default_speaker),
              data_sets[path])
        for path in files if is_audio(path)
    ]  # fmt: skip
    if speaker is None:
        found = [_refuse_reserved_speaker(item) for item in found]
        _say_merged({(item.speaker, folders[item.path]) for item in found}, say)
    others = (path for path in files if data_sets[path] is None and not is_audio(path))
    _say_others([path for path in others if path.suffix not in SIDECAR_SUFFIXES], say)
    own = {sidecar_of(item.path) for item in found} - {None}
    texts = [path for path in files if path.suffix in SIDECAR_SUFFIXES and path not in own]
    texts = _without_case_variants(texts, own)
    _say_unused([path for path in texts if data_sets[path] is None], own, say)
    for error in unreadable:
        problem = f"cannot be read ({error.strerror})"
        found.append(InputFile(Path(error.filename), speaker or default_speaker, problem=problem))
    if not found:
        known = " ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{source}: no audio in this folder (looked for {known})")
    return found


def _why_no_audio(path: Path) -> str | None:
    """Why a file can't be a recording; None if it can."""
    try:
        audio_info(path)
    except ValueError as error:
        return first_line(error, path)
    return None


def drop_prepared_clips(
    found: list[InputFile], say: Callable[[str], None] = lambda message: None
) -> list[InputFile]:
    """Without the clips of datasets, where there are raw recordings too: clips are made of these.

    A file with a `.lab` beside it is a clip that was made by hand, and no raw recording.
    """
    if all(item.data_set or _label_path(item.path).is_file() for item in found):
        return found
    made = sorted({str(item.data_set) for item in found if item.data_set is not None})
    if made:
        say(f"left out, for it is a dataset already: {printable(', '.join(made))}")
    return [item for item in found if item.data_set is None]


def is_data_set(folder: str | Path) -> bool:
    """Whether `folder` is a dataset that was prepared before, or holds some."""
    pattern = Path(folder).glob
    return any(pattern(SUMMARY_NAME)) or any(pattern(f"*/{SUMMARY_NAME}"))


def refuse_overlap(source: str, output: Path) -> None:
    """Raise `ValueError` where the recordings would be read from the dataset to be written."""
    if os.path.exists(source) and Path(source).resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"--input {source} is in the dataset --output {output}; write to another folder "
            "(to look at a dataset: --check)"
        )


def refuse_folder_of_data_sets(output: Path) -> None:
    """Raise `ValueError` where a new dataset would be written around others."""
    if not (output / RECORDS).exists() and (others := sorted(output.glob(f"*/{RECORDS}"))):
        named = printable(shorten_list(path.parent.name for path in others))
        raise ValueError(
            f"--output {output}: holds datasets already ({named}); give the folder of one, "
            f"such as {output / 'NAME'}"
        )


def name_recordings(
    found: list[InputFile], owner_of: dict[tuple[str, str], Any]
) -> list[Recording]:
    """Give every file a name that no other has, the same one in every run.

    `owner_of` maps (speaker, name), both casefolded, to the recording that an earlier run gave the
    name to, as (address, digest, name): a file that was moved, changed or renamed keeps it, also
    where an earlier version of this program made it in another way.
    """
    recordings, taken = [], set()
    in_order = sorted(found, key=lambda item: (item.speaker, str(item.path)))
    known = {address for address, *_ in owner_of.values()}
    named = {(speaker, address): name for (speaker, _), (address, _, name) in owner_of.items()}
    renamed = {
        (speaker, digest): name
        for (speaker, _), (address, digest, name) in owner_of.items()
        if has_vanished(address)
    }
    read = _without_copies([_recording_of(item) for item in in_order], known)
    for recording in sorted(read, key=lambda recording: recording.address not in known):
        name = safe_name(recording.origin.get("title") or recording.path.stem)
        speaker = recording.speaker.casefold()
        if recording.address not in known:
            name = renamed.get((speaker, recording.digest), name)
        name = named.get((speaker, recording.address), name)
        key = (speaker, name.casefold())
        owner, digest, _ = owner_of.get(key, (recording.address, "", name))
        if key in taken or (recording.address != owner and recording.digest != digest):
            name = f"{name}-{unique_suffix(recording.address)}"
            key = (recording.speaker.casefold(), name.casefold())
        taken.add(key)
        recordings.append(replace(recording, name=name))
    return recordings


def _recording_of(item: InputFile) -> Recording:
    """Look at a file and at the transcript beside it."""
    source = printable(item.origin.get("url") or shown_path(item.path))
    digest, text, encoding, problem = "", None, None, item.problem
    try:
        if item.path.exists() and not item.path.is_file():
            raise ValueError(problem or "is no file but a device or a pipe")  # it might never end
        digest = file_digest(item.path)
        text, encoding = read_transcript(item.path)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = problem or f"cannot be read ({error.strerror})"
    return Recording(
        item.path, source, item.origin.get("url") or address_of(item.path), item.speaker, "",
        digest, text, encoding, problem, item.is_clip, item.origin,
    )  # fmt: skip


def _without_copies(recordings: list[Recording], known: set[str]) -> list[Recording]:
    """The recordings; those that are copies of another have this as their problem.

    Of equal ones that can be used, the original is the first, or the first that is `known`.
    """
    usable = [recording for recording in recordings if recording.problem is None]
    firsts: dict[tuple, Recording] = {}
    for recording in sorted(usable, key=lambda recording: recording.address not in known):
        firsts.setdefault((recording.speaker, recording.digest, recording.transcript), recording)
    marked = []
    for recording in recordings:
        first = firsts.get((recording.speaker, recording.digest, recording.transcript), recording)
        if recording.problem is None and first is not recording:
            recording = replace(recording, problem=f"has the same bytes as {first.source}")
        marked.append(recording)
    return marked


def unique_suffix(text: str) -> str:
    """Six hexadecimal digits that tell `text` from others."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def address_of(path: Path) -> str:
    """The address of a file, the same from every folder: `file:///...`."""
    return Path(os.path.abspath(path)).as_uri()


def has_vanished(address: str) -> bool:
    """Whether an address is that of a file which is there no more."""
    return urlsplit(address).scheme == "file" and not os.path.lexists(_path_at(address))


def _path_at(address: str) -> str | bytes:
    """The path that `address_of` was given."""
    if os.name == "nt":  # drives and shares
        return url2pathname(address.removeprefix("file:"))
    return unquote_to_bytes(urlsplit(address).path)  # in any encoding


def printable(text: str) -> str:
    """`text` without what a file name may hold and UTF-8 can't."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def first_line(error: Exception, path: Path | None = None) -> str:
    """What an error says, on one line, without the name of the file at `path`."""
    text = printable(str(error))
    if path is not None:
        text = text.removeprefix(f"{printable(str(path))}: ")
    return (text.strip().splitlines() or [type(error).__name__])[0]


def speaker_name(text: str) -> str:
    """A speaker's folder name made of what the user typed. Raises `ValueError` where none is left.

    >>> speaker_name("../../x")
    'x'
    """
    if not any(character.isalnum() for character in text):
        raise ValueError(f"--speaker {text!r}: a speaker's name needs a letter or a digit")
    name = safe_name(text)
    if name.casefold() == REJECTED:
        raise ValueError(f"--speaker {text!r}: this name is kept for the clips that are rejected")
    return name


def read_transcript(path: Path) -> tuple[str | None, str | None]:
    """The transcript beside the recording at `path`, on one line, and its encoding if guessed.

    Both are None without a sidecar. Raises `ValueError` where the sidecar has no letter in it, or
    no known encoding.
    """
    sidecar = sidecar_of(path)
    if sidecar is None:
        return None, None
    name = f"its transcript {printable(sidecar.name)}"
    try:
        text, encoding = encodings.decode(sidecar.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    text = collapse_whitespace(text)
    if not text:
        raise ValueError(f"{name} is empty")
    if not any(character.isalnum() for character in text):
        raise ValueError(f"{name} has no letter in it: {text[:40]!r}")
    return text, encoding


def collapse_whitespace(text: str) -> str:
    """`text` on one line: control characters gone, runs of white space made one space."""
    kept = (c if unicodedata.category(c) != "Cc" or c.isspace() else "" for c in text)
    return " ".join("".join(kept).replace("\ufeff", "").split())


def _folder_of(path: Path, root: Path) -> str | None:
    """The first folder between `root` and `path`, which is named after the speaker."""
    folders = path.relative_to(root).parts[:-1]
    return unicodedata.normalize("NFC", folders[0]) if folders else None


def _say_merged(speakers: set[tuple[str, str | None]], say: Callable[[str], None]) -> None:
    """Of pairs (speaker, folder), say which folders become one speaker: those whose names differ
    only in characters that a speaker's name can't have."""
    speakers = sorted((name, folder) for name, folder in speakers if folder is not None)
    for name, pairs in groupby(speakers, lambda pair: pair[0]):
        folders = [printable(folder) for _, folder in pairs]
        if len(folders) > 1:
            say(f"taken for one speaker, {name}: the folders {shorten_list(folders)}; if these are "
                "several, rename them")  # fmt: skip


def _refuse_reserved_speaker(item: InputFile) -> InputFile:
    """`item`, with the problem where its folder's name can't be a speaker's."""
    if item.speaker.casefold() != REJECTED:
        return item
    problem = f"a folder {REJECTED!r} is for clips: rename it, or give --speaker"
    return replace(item, problem=problem)


def _data_set_of(path: Path, root: Path) -> Path | None:
    """The dataset that `path`, a file under `root`, was prepared for."""
    for folder in path.parents:
        if (folder / SUMMARY_NAME).is_file() or (folder / RECORDS).is_dir():
            return folder
        if folder == root:
            return None
    return None


def _label_path(path: Path) -> Path:
    return path.with_suffix(".lab")


def _without_case_variants(paths: list[Path], others: set[Path]) -> list[Path]:
    """Without those that are the same file as one of `others`, named in another case."""
    spelled = {str(other).casefold(): other for other in others}
    return [
        path
        for path in paths
        if (other := spelled.get(str(path).casefold())) is None or not path.samefile(other)
    ]


def _say_unused(texts: list[Path], own: set[Path], say: Callable[[str], None]) -> None:
    """Name the texts that no recording takes, and why."""
    taken = {path.with_suffix("") for path in own}
    for reason, is_second in (
        ("no recording has the name of these texts", False),
        ("these texts are not used, for one in another format has their name", True),
    ):
        if paths := [path for path in texts if (path.with_suffix("") in taken) == is_second]:
            say(f"{reason}: {shorten_list(printable(shown_path(path)) for path in paths)}")


def _say_others(paths: list[Path], say: Callable[[str], None]) -> None:
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths)
    if counts:
        kinds = ", ".join(f"{count} {printable(suffix)}" for suffix, count in counts.most_common())
        say(f"not looked at, by their suffixes: {kinds}")
