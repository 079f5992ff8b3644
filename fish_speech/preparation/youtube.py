"""Recordings from the web: yt-dlp as a library downloads the best audio of a video or a playlist.

A download is kept, with where it came from, until its folder is deleted: no address is fetched
twice, and an interrupted download is resumed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fish_speech.console import error_message
from fish_speech.files import read_json, read_text, write_json
from fish_speech.preparation.sources import InputFile

FOLDER = ".downloads"  # in the dataset


def fetch(
    address: str,
    folder: Path,
    speaker: str,
    *,
    cookies: str | None = None,
    cookies_from_browser: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[InputFile]:
    """Download what is at `address` into `folder`: one file, or one for each playlist entry.

    Playlists of playlists (a channel) are followed. An entry that can't be had comes back with its
    `problem`. Raises `ValueError` with the remedy where nothing can be had at all.
    """
    if _known_download(address, folder) is None and os.path.exists(address):
        raise ValueError(f"--input {address} is on this machine: leave out --youtube")
    settings = _settings(folder, cookies, cookies_from_browser, say)
    found = list(_entries({"url": address}, folder, speaker, settings, set()))
    if not found:
        raise ValueError(f"{address}: an empty playlist")
    return found


def _entries(
    entry: dict[str, Any], folder: Path, speaker: str, settings: dict[str, Any], seen: set[str]
) -> Iterator[InputFile]:
    """What an entry of a listing holds. Raises `ValueError` where it can't be had."""
    link, inner = _link(entry), entry.get("entries")
    if inner is None:
        if link in seen:
            return
        seen.add(link)
        known = _known_download(link, folder)
        if known is None:
            info = _download(link, settings)
            inner = info.get("entries")
            known = _save_metadata(link, info, folder) if inner is None else {}
        if inner is None:
            origin = {key: value for key, value in known.items() if key != "file"}
            yield InputFile(folder / known["file"], speaker, origin=origin)
            return
    for number, part in enumerate(inner, 1):
        try:
            if part is None:
                raise ValueError("is private or was deleted")
            yield from _entries(part, folder, speaker, settings, seen)
        except ValueError as error:
            url = (part and _link(part)) or f"{link}#{number}"
            title = (part and (part.get("title") or part.get("id"))) or f"entry {number}"
            origin = {"url": url, "title": title}
            yield InputFile(folder / _key(url), speaker, origin=origin, problem=str(error))


def _link(entry: dict[str, Any]) -> str:
    return entry.get("webpage_url") or entry.get("url") or entry.get("id") or ""


def _download(address: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Download a video, or list a playlist without its videos; returns what yt-dlp knows of it."""
    with tqdm(desc="downloading", unit="B", unit_scale=True, disable=None) as progress:

        def show(status: dict[str, Any]) -> None:
            progress.total = status.get("total_bytes") or status.get("total_bytes_estimate")
            progress.update(status.get("downloaded_bytes", 0) - progress.n)

        # Named by the address: what yt-dlp calls an id may be a file's name, which others have too.
        name = f"{_key(address)}.%(ext)s"
        return _extract_info(address, {**settings, "outtmpl": name, "progress_hooks": [show]})


def _save_metadata(address: str, info: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write, and return, where the download of `address` came from."""
    downloads = info.get("requested_downloads")
    if not downloads:
        raise ValueError(f"{address} can't be downloaded: there is no audio at it (yet)")
    path = Path(downloads[0]["filepath"])
    known = {
        "file": path.name,
        "url": info.get("webpage_url") or address,
        "title": info.get("title") or info["id"],
        "id": info["id"],
        "date": info.get("upload_date"),
    }
    write_json(folder / f"{_key(address)}.json", known)
    return known


def _known_download(address: str, folder: Path) -> dict[str, Any] | None:
    note = folder / f"{_key(address)}.json"
    if not note.is_file():
        return None
    known = read_json(note)
    return known if (folder / known["file"]).is_file() else None


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _settings(
    folder: Path,
    cookies: str | None,
    cookies_from_browser: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "format": "bestaudio/best",
        "extract_flat": "in_playlist",  # a playlist is listed; its videos come one by one
        "paths": {"home": str(folder)},
        "noplaylist": True,  # a video's address that also names a playlist means the video
        "fixup": "never",  # no ffmpeg program is needed: PyAV reads what comes
        "noprogress": True,
        "color": {"stdout": "no_color", "stderr": "no_color"},
        "logger": _WarningLogger(say),
        "socket_timeout": 30,
        # A program has these by default, the library doesn't: it would leave out what it can't get.
        "retries": 10,
        "fragment_retries": 10,
        "skip_unavailable_fragments": False,
        "retry_sleep_functions": dict.fromkeys(("http", "fragment"), _retry_seconds),
    }
    if cookies is not None:
        try:
            settings["cookiefile"] = read_text(cookies)
        except (OSError, ValueError) as error:
            raise ValueError(f"--cookies {error_message(error)}") from error
    if cookies_from_browser is not None:
        browser, _, profile = cookies_from_browser.partition(":")
        settings["cookiesfrombrowser"] = (browser, profile or None, None, None)
    return settings


def _retry_seconds(n: int) -> float:
    """How long to wait before the try after `n` others (0, 1, ...)."""
    return min(30, 2**n - 1)


def _extract_info(address: str, settings: dict[str, Any]) -> dict[str, Any]:
    import yt_dlp

    if "cookiefile" in settings:  # a copy: yt-dlp writes into what it is given
        settings = {**settings, "cookiefile": io.StringIO(settings["cookiefile"])}
    try:
        with yt_dlp.YoutubeDL(settings) as downloader:
            return downloader.extract_info(address) or {}
    except yt_dlp.utils.YoutubeDLError as error:
        reason = _user_message(str(error).removeprefix("ERROR: "))
        raise ValueError(
            f"{address} can't be downloaded: {reason.rstrip('.')}. {_remedy(reason)}"
        ) from error


def _user_message(message: str) -> str:
    """A message of yt-dlp, without what is for its developers."""
    return re.split(r"; please report|\(caused by", message)[0].strip()


def _remedy(reason: str) -> str:
    if "No space left" in reason:
        return "Make room on the disk; the same command goes on where this one stopped"
    if re.search(r"resolve|[Nn]ame resolution|Network is unreachable", reason):
        return "Is there a network? The same command goes on where this one stopped"
    if re.search(r"time[d ]+out|Giving up|resolv|[Cc]onnection|HTTP Error 5", reason):
        return "The same command goes on where this one stopped"
    if re.search(r"truncated|not a valid URL", reason):
        return "Copy the address of the video from the browser, whole"
    return (
        "Update yt-dlp (pip install -U 'yt-dlp[default,deno]'); a video that asks for a login "
        "needs --cookies or --cookies-from-browser"
    )


class _WarningLogger:
    """yt-dlp's messages: warnings are passed on, its errors are raised and said once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def warning(self, message: str) -> None:
        if "Retrying" not in message:  # what comes of it is said once
            self._say(_user_message(message))

    def debug(self, message: str) -> None:
        pass

    info = error = debug
