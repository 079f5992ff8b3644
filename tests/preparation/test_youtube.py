"""The real yt-dlp, against files served on this machine."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fish_speech.preparation import youtube
from fish_speech.preparation.options import Options
from fish_speech.preparation.pipeline import prepare
from fish_speech.preparation.transcribe import Transcription

# yt-dlp leaves the socket of a refused download to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path in self.server.busy:
            self.server.busy.remove(self.path)
            self.send_error(503)
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.asked, server.busy = folder, [], []
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_video_is_downloaded_once_cut_and_its_origin_kept(server, take, reader, tmp_path):
    recording = take(5)
    video = server.folder / "My talk.flac"
    video.write_bytes(recording.path.read_bytes())
    options = Options(
        input=f"{server.address}/My%20talk.flac", output=tmp_path / "data", speaker="You Tuber",
        youtube=True, auto_transcribe=True, max_duration=10 / 60, segment_duration=4.0,
    )  # fmt: skip
    summary = prepare(options, recogniser=reader(recording))
    assert [clip["text"] for clip in summary.clips[:2]] == recording.texts[:2]
    assert summary.clips[0]["file"] == "You_Tuber/My_talk_0001.wav"
    assert summary.clips[0]["source"] == options.input
    (account,) = summary.recordings
    assert account["origin"]["url"] == options.input
    assert account["origin"]["title"] == "My talk"
    assert {"id", "date"} <= set(account["origin"])
    assert account["duration"] == 10  # no more is decoded
    asked = len(server.asked)
    assert prepare(options, recogniser=reader(recording)) == summary
    assert len(server.asked) == asked > 0


def test_a_download_that_broke_off_goes_on(server, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(server.folder / "a.wav", noise, 16_000)
    whole = (server.folder / "a.wav").read_bytes()
    folder = tmp_path / "downloads"
    folder.mkdir()
    address = f"{server.address}/a.wav"
    (folder / f"{youtube._key(address)}.wav.part").write_bytes(whole[:5000])
    (found,) = youtube.fetch(address, folder, "me")
    assert found.path.read_bytes() == whole
    assert not list(folder.glob("*.part"))


def test_no_part_of_a_stream_is_left_out_because_a_server_was_busy(server, tmp_path):
    tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000)
    parts = [f"part{number}.mp3" for number in range(3)]
    for part in parts:
        soundfile.write(server.folder / part, tone, 16_000)
    lines = "".join(f"#EXTINF:1.0,\n{part}\n" for part in parts)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{lines}#EXT-X-ENDLIST\n"
    (server.folder / "talk.m3u8").write_text(playlist)
    server.busy.append("/part1.mp3")
    (found,) = youtube.fetch(f"{server.address}/talk.m3u8", tmp_path / "downloads", "me")
    assert found.path.stat().st_size == sum((server.folder / p).stat().st_size for p in parts)
    assert server.asked.count("/part1.mp3") == 2


def test_recordings_of_one_file_name_are_two_recordings(server, tmp_path):
    for episode, pitch in (("one", 200), ("two", 300)):
        (server.folder / episode).mkdir()
        tone = 0.1 * np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000)
        soundfile.write(server.folder / episode / "audio.wav", tone, 16_000)
    for episode in ("one", "two"):
        address = f"{server.address}/{episode}/audio.wav"
        (found,) = youtube.fetch(address, tmp_path / "downloads", "me")
        assert found.path.read_bytes() == (server.folder / episode / "audio.wav").read_bytes()


def test_what_a_busy_server_refuses_is_to_be_tried_again(server, tmp_path):
    server.busy += ["/a.wav"] * 20
    with pytest.raises(ValueError, match=r"503.*The same command goes on"):
        youtube.fetch(f"{server.address}/a.wav", tmp_path / "downloads", "me")


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("http://127.0.0.1:1/talk.mp3", "Connection refused. The same command goes on"),
        ("https://youtube.com/watch?v=VIDEO_ID", "Copy the address of the video"),
    ],
)
def test_what_can_not_be_reached_is_said_without_exceptions(tmp_path, address, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        youtube.fetch(address, tmp_path / "downloads", "me")
    assert "caused by" not in str(caught.value)


def test_a_full_disk_is_not_for_want_of_a_newer_yt_dlp(server, tmp_path, monkeypatch):
    soundfile.write(server.folder / "a.wav", np.zeros(16_000), 16_000)

    def full(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("yt_dlp.downloader.common.FileDownloader.slow_down", full)
    with pytest.raises(ValueError, match=r"No space left on device\. Make room on the disk; the"):
        youtube.fetch(f"{server.address}/a.wav", tmp_path / "downloads", "me")


def test_a_missing_video_ends_in_one_line_with_the_remedy(server, tmp_path):
    with pytest.raises(ValueError, match="404") as caught:
        youtube.fetch(f"{server.address}/none.webm", tmp_path / "downloads", "me")
    message = str(caught.value)
    assert "\n" not in message
    assert "pip install -U 'yt-dlp" in message
    assert "--cookies" in message


def test_a_playlist_gives_what_can_be_had_and_names_the_rest(server, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(server.folder / "a.wav", noise, 16_000)
    items = "".join(
        f"<item><title>Part {name}</title><link>{server.address}/{name}.wav</link></item>"
        for name in "ab"
    )
    (server.folder / "feed.xml").write_text(
        f'<?xml version="1.0"?><rss version="2.0"><channel><title>Talks</title>{items}'
        "</channel></rss>"
    )
    found = youtube.fetch(f"{server.address}/feed.xml", tmp_path / "downloads", "me")
    assert [item.problem is None for item in found] == [True, False]
    assert "404" in found[1].problem
    options = Options(f"{server.address}/feed.xml", tmp_path / "data", youtube=True)
    with pytest.raises(ValueError, match="add --auto-transcribe"):
        prepare(options)
    assert not (tmp_path / "data").exists()  # and nothing was downloaded
    reader = SimpleNamespace(identity="reader", transcribe=lambda samples: Transcription(""))
    summary = prepare(replace(options, auto_transcribe=True), recogniser=reader)
    assert summary.failed == 2
    assert {entry["source"][-5:] for entry in summary.skipped} == {"a.wav", "b.wav"}


def test_a_text_that_was_put_beside_a_download_needs_no_recogniser(server, tmp_path, utterances):
    soundfile.write(server.folder / "a.wav", utterances[0].samples, 16_000)
    address, output = f"{server.address}/a.wav", tmp_path / "data"
    (found,) = youtube.fetch(address, output / youtube.FOLDER, "me")
    found.path.with_suffix(".txt").write_text(utterances[0].text)
    (clip,) = prepare(Options(address, output, youtube=True)).clips
    assert clip["text"] == utterances[0].text


def test_playlists_of_playlists_are_followed_and_what_is_gone_is_named(monkeypatch, tmp_path):
    folder = tmp_path / "downloads"
    channel, videos = "https://y/channel", "https://y/channel/videos"
    talk = {"webpage_url": "https://y/talk", "title": "Talk", "id": "talk"}
    listings = {
        channel: [{"url": videos}, {"title": "Shorts", "entries": [None, {"url": "https://y/live"}]}],
        videos: [{"url": "https://y/talk"}, {"url": "https://y/talk"}, None],
    }  # fmt: skip

    class Downloader:
        def __init__(self, settings):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def extract_info(self, address):
            if address in listings:
                return {"_type": "playlist", "entries": listings[address]}
            if address == "https://y/live":
                return {"id": "live", "is_live": True}  # announced, nothing to download yet
            (folder / "talk.webm").touch()
            return {**talk, "requested_downloads": [{"filepath": str(folder / "talk.webm")}]}

    monkeypatch.setattr("yt_dlp.YoutubeDL", Downloader)
    found = youtube.fetch(channel, folder, "me")
    assert [item.problem for item in found] == [
        None,
        "is private or was deleted",
        "is private or was deleted",
        "https://y/live can't be downloaded: there is no audio at it (yet)",
    ]
    assert found[0].path == folder / "talk.webm"
    assert len({item.origin["url"] for item in found}) == 4


def test_cookies_and_local_files_are_checked_first(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(ValueError, match="leave out --youtube"):
        youtube.fetch(str(tmp_path / "a.wav"), tmp_path / "downloads", "me")
    with pytest.raises(ValueError, match=r"--cookies .*none\.txt"):
        youtube.fetch("http://127.0.0.1/x", tmp_path, "me", cookies=str(tmp_path / "none.txt"))


def test_cookies_are_passed_on(monkeypatch, tmp_path):
    given = {}

    class Downloader:
        def __init__(self, settings):
            given.update(settings)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def extract_info(self, address):
            return {"_type": "playlist", "entries": []}

    monkeypatch.setattr("yt_dlp.YoutubeDL", Downloader)
    jar = tmp_path / "jar.txt"
    jar.write_text("# Netscape HTTP Cookie File")
    jar.chmod(0o400)
    cookies = {"cookies": str(jar), "cookies_from_browser": "firefox:work"}
    with pytest.raises(ValueError, match="empty playlist"):
        youtube.fetch("https://youtube.com/playlist?list=x", tmp_path, "me", **cookies)
    assert given["cookiefile"].read() == jar.read_text()  # a copy: yt-dlp writes into its cookies
    assert given["cookiesfrombrowser"] == ("firefox", "work", None, None)
    assert given["format"].startswith("bestaudio")
