"""What there is to prepare: recordings, who speaks in them, and the transcripts beside them."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fish_speech.files import AUDIO_SUFFIXES, file_digest, list_audio, safe_name

SUMMARY_NAME = "dataset_summary.json"
REJECTED = "rejected"
SIDECAR_SUFFIXES = (".lab", ".txt")


@dataclass(frozen=True)
class Recording:
    """One input file. `name` is what its clips are called; `source` is what people know it as.

    `problem` says why it can't be used, where that is known before it is decoded. `transcript` is
    the text beside it, white space folded, or None. `prepared`: it is a clip of a data set.
    `origin` holds a download's provenance.
    """

    path: Path
    source: str
    speaker: str
    name: str
    digest: str
    transcript: str | None = None
    problem: str | None = None
    prepared: bool = False
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A file to prepare, before it has a name; fields as in `Recording`."""

    path: Path
    speaker: str
    prepared: bool = False
    problem: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def find_local(
    source: str | Path, speaker: str | None, default_speaker: str, *, but: Path | None = None
) -> list[Found]:
    """All audio at `source`, a file or a folder (its first subfolders are speakers).

    What lies under `but` is left out. Raises `FileNotFoundError` where nothing is there,
    `ValueError` where nothing in it is audio.
    """
    source = Path(source)
    if source.is_file():
        return [Found(source, speaker or default_speaker)]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder (for a web address, --youtube)")
    found = [
        Found(path, speaker or _speaker_of(path, source) or default_speaker, _is_clip(path, source))
        for path in list_audio(source)
        if not _is_rejected(path, source)
        and not (but and path.resolve().is_relative_to(but.resolve()))
    ]
    if not found:
        known = " ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{source}: no audio in this folder (looked for {known})")
    return found


def is_data_set(folder: str | Path) -> bool:
    """Whether `folder` is a data set that was prepared before, or holds some."""
    pattern = Path(folder).glob
    return any(pattern(SUMMARY_NAME)) or any(pattern(f"*/{SUMMARY_NAME}"))


def refuse_overlap(source: str, output: Path) -> None:
    """Raise `ValueError` where the recordings would be read from the data set to be written."""
    if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"--input {source} is in the data set --output {output}; write to another folder "
            "(to look at a data set: --check)"
        )


def name_recordings(found: list[Found], owner_of: dict[tuple[str, str], Any]) -> list[Recording]:
    """Give every file a name that no other has, the same one in every run.

    `owner_of` maps (speaker, name), both casefolded, to the recording that an earlier run gave the
    name to, as (source, digest): a file that moved or changed keeps it.
    """
    recordings, taken, first_with = [], set(), {}
    for item in sorted(found, key=lambda item: (item.speaker, str(item.path))):
        source, speaker = item.origin.get("url") or display_path(item.path), item.speaker
        digest, text, problem = "", None, item.problem
        try:
            digest = file_digest(item.path)
            text = read_transcript(item.path)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = problem or f"cannot be read ({error.strerror})"
        name = safe_name(item.origin.get("title") or item.path.stem)
        key = (speaker.casefold(), name.casefold())
        owner = owner_of.get(key)
        if key in taken or (owner and source != owner[0] and digest != owner[1]):
            name = f"{name}-{unique_suffix(source)}"
            key = (speaker.casefold(), name.casefold())
        twin = first_with.setdefault((speaker, digest, text), source) if digest else source
        if twin != source:
            problem = f"has the same bytes as {twin}"
        taken.add(key)
        recordings.append(
            Recording(
                item.path, source, speaker, name, digest, text, problem, item.prepared, item.origin
            )
        )
    return recordings


def unique_suffix(text: str) -> str:
    """Six hexadecimal digits that tell `text` from others."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def display_path(path: Path) -> str:
    """`path` from the current folder where it is below it, absolute otherwise."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return printable((absolute if relative.startswith("..") else relative).replace(os.sep, "/"))


def printable(text: str) -> str:
    """`text` without what a file name may hold and UTF-8 can't."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def speaker_name(text: str) -> str:
    """A speaker's folder name made of what the user typed. Raises `ValueError` where none is left.

    >>> speaker_name("../../x")
    'x'
    """
    if not any(character.isalnum() for character in text):
        raise ValueError(f"--speaker {text!r}: a speaker's name needs a letter or a digit")
    name = safe_name(text)
    if name == REJECTED:
        raise ValueError(f"--speaker {text!r}: this name is kept for the clips that are rejected")
    return name


def sidecar_of(path: Path) -> Path | None:
    """The transcript file beside a recording, or None."""
    for suffix in SIDECAR_SUFFIXES:
        sidecar = path.with_name(path.stem + suffix)
        if sidecar.is_file():
            return sidecar
    return None


def read_transcript(path: Path) -> str | None:
    """The transcript beside the recording at `path`, white space folded; None without a sidecar.

    Raises `ValueError` where the sidecar is there and has no letter in it, or no known encoding.
    """
    sidecar = sidecar_of(path)
    if sidecar is None:
        return None
    text = fold(decode_text(sidecar.read_bytes(), sidecar.name))
    if not text:
        raise ValueError(f"its transcript {sidecar.name} is empty")
    if not any(character.isalnum() for character in text):
        raise ValueError(f"its transcript {sidecar.name} has no letter in it: {text[:40]!r}")
    return text


def decode_text(data: bytes, name: str) -> str:
    """Decode a text file: a byte order mark, UTF-8, or the legacy encoding that fits best."""
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        text = data.decode("utf-8")
        if "\0" not in text:
            return text
    except UnicodeDecodeError:
        pass
    from charset_normalizer import from_bytes

    best = from_bytes(data).best()
    if best is None:
        raise ValueError(f"its transcript {name} is no text in a known encoding; save it as UTF-8")
    return str(best)


def fold(text: str) -> str:
    """`text` on one line: control characters gone, runs of white space made one space."""
    kept = (c if unicodedata.category(c) != "Cc" or c.isspace() else "" for c in text)
    return " ".join("".join(kept).replace("\ufeff", "").split())


def _speaker_of(path: Path, root: Path) -> str | None:
    """The first folder between `root` and `path`; a prepared data set on the way starts anew."""
    folders = path.relative_to(root).parts[:-1]
    for depth in range(len(folders) - 1, -1, -1):
        if root.joinpath(*folders[:depth], SUMMARY_NAME).is_file():
            folders = folders[depth:]
            break
    return safe_name(folders[0]) if folders else None


def _is_clip(path: Path, root: Path) -> bool:
    """Whether `path` belongs to a data set that was prepared before."""
    return path.with_suffix(".lab").is_file() and any(
        (folder / SUMMARY_NAME).is_file()
        for folder in path.parents
        if folder == root or root in folder.parents
    )


def _is_rejected(path: Path, root: Path) -> bool:
    """Whether `path` is among the rejected clips of a prepared data set."""
    return any(
        folder.name == REJECTED and (folder.parent / SUMMARY_NAME).is_file()
        for folder in path.parents
        if folder == root or root in folder.parents
    )
