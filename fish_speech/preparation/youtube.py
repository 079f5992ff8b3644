"""Recordings from the web: yt-dlp as a library downloads the best audio of a video or a playlist.

A download is kept, with where it came from, until its folder is deleted: the same address is never
fetched twice, and what broke off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fish_speech.files import read_json, write_json
from fish_speech.preparation.sources import Found

FOLDER = ".downloads"  # in the data set


def fetch(
    address: str,
    folder: Path,
    speaker: str,
    *,
    cookies: str | None = None,
    cookies_from_browser: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[Found]:
    """Download what is at `address` into `folder`: one file, or one for each playlist entry.

    An entry that can't be had comes back with its `problem`. Raises `ValueError` with the remedy
    where nothing can be had at all.
    """
    known = _downloaded(address, folder)
    if known is not None:
        return [_found(known, folder, speaker)]
    if Path(address).exists():
        raise ValueError(f"--input {address} is on this machine: leave out --youtube")
    settings = _settings(folder, cookies, cookies_from_browser, say)
    listing = _ask(address, {**settings, "extract_flat": "in_playlist"}, download=False)
    if listing.get("_type") != "playlist":
        return [_found(_download(address, folder, settings), folder, speaker)]
    found = []
    for entry in listing.get("entries") or ():
        link = entry.get("webpage_url") or entry.get("url") or ""
        try:
            known = _downloaded(link, folder) or _download(link, folder, settings)
            found.append(_found(known, folder, speaker))
        except ValueError as error:
            origin = {"url": link, "title": entry.get("title") or entry.get("id") or "video"}
            found.append(Found(folder / _key(link), speaker, origin=origin, problem=str(error)))
    if not found:
        raise ValueError(f"{address}: an empty playlist")
    return found


def _download(address: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Download one video; returns what `_downloaded` will know of it."""
    with tqdm(desc="downloading", unit="B", unit_scale=True, disable=None) as progress:

        def show(status: dict[str, Any]) -> None:
            progress.total = status.get("total_bytes") or status.get("total_bytes_estimate")
            progress.update(status.get("downloaded_bytes", 0) - progress.n)

        info = _ask(address, {**settings, "progress_hooks": [show]}, download=True)
    path = Path(info["requested_downloads"][0]["filepath"])
    known = {
        "file": path.name,
        "url": info.get("webpage_url") or address,
        "title": info.get("title") or info["id"],
        "id": info["id"],
        "date": info.get("upload_date"),
    }
    write_json(folder / f"{_key(address)}.json", known)
    return known


def _downloaded(address: str, folder: Path) -> dict[str, Any] | None:
    note = folder / f"{_key(address)}.json"
    if not note.is_file():
        return None
    known = read_json(note)
    return known if (folder / known["file"]).is_file() else None


def _found(known: dict[str, Any], folder: Path, speaker: str) -> Found:
    origin = {key: value for key, value in known.items() if key != "file"}
    return Found(folder / known["file"], speaker, origin=origin)


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
        "outtmpl": "%(id).100B.%(ext)s",
        "paths": {"home": str(folder)},
        "windowsfilenames": True,
        "noplaylist": True,  # a video's address that also names a playlist means the video
        "fixup": "never",  # no ffmpeg program is needed: PyAV reads what comes
        "noprogress": True,
        "color": {"stdout": "no_color", "stderr": "no_color"},
        "logger": _Quiet(say),
        "socket_timeout": 30,
    }
    if cookies is not None:
        if not Path(cookies).is_file():
            raise FileNotFoundError(f"--cookies {cookies}: no such file")
        settings["cookiefile"] = cookies
    if cookies_from_browser is not None:
        browser, _, profile = cookies_from_browser.partition(":")
        settings["cookiesfrombrowser"] = (browser, profile or None, None, None)
    return settings


def _ask(address: str, settings: dict[str, Any], *, download: bool) -> dict[str, Any]:
    import yt_dlp

    try:
        with yt_dlp.YoutubeDL(settings) as downloader:
            return downloader.extract_info(address, download=download)
    except yt_dlp.utils.YoutubeDLError as error:
        reason = str(error).removeprefix("ERROR: ").split("; please report")[0].strip()
        raise ValueError(
            f"{address} can't be downloaded: {reason.rstrip('.')}. Update yt-dlp (pip install -U "
            "yt-dlp); a video that asks for a login needs --cookies or --cookies-from-browser"
        ) from error


class _Quiet:
    """yt-dlp's messages: warnings are passed on, its errors are raised and said once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.warning = say

    def debug(self, message: str) -> None:
        pass

    info = error = debug
