"""Files that outlive a crash: atomic writes, listing, safe names, digests and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "mp4", "m4v", "mkv", "mov"),
        *("webm", "wma", "aif", "aiff", "au", "amr", "caf", "w64", "rf64", "3gp", "avi", "mpga"),
        *("mka", "mp2", "voc", "snd", "wv", "ac3", "flv", "wmv", "ts"),
    )
)
SIDECAR_SUFFIXES = (".lab", ".txt", ".LAB", ".TXT")  # of the transcript beside a recording
_TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_FILE = re.compile(rf"{re.escape(_TEMPORARY_PREFIX)}\d+-([0-9a-f]{{16}})(\..*)?")
_WINDOWS_DEVICE = re.compile(r"^(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])(?=\.|$)", re.IGNORECASE)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, flushed and renamed to it when the block succeeds.

    The suffix is kept, so that writers that choose a format by suffix work. When the block raises,
    the temporary file is removed and whatever stood at `path` is untouched. An `OSError` names
    `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the name itself: a long one leaves no room for more.
    name = f"{_TEMPORARY_PREFIX}{os.getpid()}-{_short_digest(path.name)}{path.suffix}"
    temporary = path.with_name(name)
    try:
        with errors_naming(path, temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it may be what failed
            temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise system errors that name no file, or only `temporary`, as errors of `path`.

    (A full disk is noticed when a file is written, and open files don't know their names.)
    """
    try:
        yield
    except OSError as error:
        of_temporary = temporary and str(temporary) in (error.filename, error.filename2)
        if error.errno and (error.filename is None or of_temporary):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def _short_digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place when the block succeeds.

    A link is followed. Raises `ValueError` where `path` is a file.
    """
    if Path(path).is_file():
        raise ValueError(f"{path}: a file is in the place of this folder; move it away")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"{re.escape(_TEMPORARY_PREFIX)}\d+-(old-)?{re.escape(path.name)}")
    for left in path.parent.iterdir():  # by a killed run
        if ours.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    old = path.with_name(f"{_TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        inside = str(error.filename).removeprefix(str(temporary))
        if inside != str(error.filename):  # a name that is gone with the error
            raise type(error)(error.errno, error.strerror, f"{path}{inside}") from error
        raise
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            old.rename(path)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Remove what killed runs left of `atomic_path` anywhere under `folder`.

    Given `names`, only what was to become files of these names in `folder` itself, where others may
    write too. Hold the lock of what is removed.
    """
    folder = Path(folder)
    digests = {_short_digest(name) for name in names} if names is not None else None
    for path in list((folder.rglob if names is None else folder.glob)(f"{_TEMPORARY_PREFIX}*")):
        match = _TEMPORARY_FILE.fullmatch(path.name)
        if match and (digests is None or match[1] in digests):
            path.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def decode_text(content: bytes, name: str | Path) -> str:
    """UTF-8, with or without a byte order mark. Raises `ValueError` that names it if it isn't."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text ({error.reason} at {error.start}); save it as UTF-8"
        ) from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file. Raises `ValueError` that names the file where it is none."""
    text = decode_text(Path(path).read_bytes(), path)
    if (place := text.find("\0")) >= 0:  # as in UTF-16, all of which may be valid UTF-8
        raise ValueError(f"{path}: not UTF-8 text (a zero byte at {place}); save it as UTF-8")
    return text


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `ValueError` that names the file where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 alike; brackets without end
        raise ValueError(
            f"{path}: not a JSON file ({error}); mend it or put back a copy"
        ) from error


def sidecar_of(audio: str | Path) -> Path | None:
    """The transcript file beside a recording, or None."""
    audio = Path(audio)
    beside = (audio.with_name(audio.stem + suffix) for suffix in SIDECAR_SUFFIXES)
    return next((path for path in beside if path.is_file()), None)


def is_audio(path: Path) -> bool:
    """Whether a file's name says that it holds sound."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def list_files(
    folder: str | Path, on_error: Callable[[OSError], object] | None = None
) -> list[Path]:
    """All files under `folder`, sorted; hidden ones and symlink loops left out.

    A folder that can't be read goes to `on_error`, or is raised, so that none is missed in silence.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=on_error or _raise, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def list_audio(folder: str | Path) -> list[Path]:
    """The audio and video files among `list_files`. Raises `OSError` for an unreadable folder."""
    return [path for path in list_files(folder) if is_audio(path)]


def _raise(error: OSError) -> NoReturn:
    raise error


def shown_path(path: str | Path) -> str:
    """A path as a user would type it: relative if it is below the working directory."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def safe_name(text: str, *, max_length: int = 80) -> str:
    """A file name made of `text`: only letters with their marks, digits and `_ . -`; never hidden,
    empty, a path, or a device name of Windows.

    >>> safe_name("../../My  voice: take 1")
    'My_voice_take_1'
    """
    kept, spelled = [], False
    for character in unicodedata.normalize("NFC", text):
        # In many scripts vowels are marks. Marks on a digit or an emoji are left out.
        is_mark = spelled and unicodedata.category(character) in ("Mn", "Mc")
        spelled = is_mark or character.isalpha()
        kept.append(character if is_mark or character.isalnum() or character in "_.-" else " ")
    name = "_".join("".join(kept).split()).strip("._-")[:max_length].rstrip("._-")
    while len(name.encode()) > 200:  # file systems count bytes
        name = name[:-1]
    return _WINDOWS_DEVICE.sub(r"\g<0>_", name) or "unnamed"


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class InUseError(ValueError):
    """Another process holds the lock; the message says which."""


@contextmanager
def exclusive(folder: str | Path, what: str) -> Iterator[None]:
    """Hold the lock for writing under `folder`; messages call it `what`.

    Raises `InUseError` that says who holds it, and `ValueError` where the folder is not writable or
    a file is in its place. Where the file system has locks, the operating system frees it when its
    holder dies, however it dies.
    """
    folder = Path(folder)
    lock, holder = FileLock(folder / ".lock"), folder / ".lock-holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (FileExistsError, NotADirectoryError) as error:
        way = next(part for part in (folder, *folder.parents) if part.is_symlink() or part.exists())
        raise ValueError(
            f"{way}: is a file, and a folder is to be here; move it or choose another name"
        ) from error
    except Timeout:
        try:
            who = holder.read_text(encoding="utf-8")
        except OSError:  # just ended, or not written yet
            who = "another process"
        raise InUseError(f"{what} is in use by {who}; wait for it to end, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"{folder}: can't be written to ({error.strerror.lower()}); take a folder that can"
        ) from error
    try:
        program = Path(sys.argv[0]).name
        with errors_naming(holder):
            holder.write_text(f"process {os.getpid()} ({program})", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
