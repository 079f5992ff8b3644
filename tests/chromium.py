"""A headless Chromium to read pages with, driven over DevTools' pipe: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--mute-audio", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank",
]  # fmt: skip
# DevTools reads file descriptor 3 and writes 4.
_START = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(r, 3), os.dup2(w, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """A browser with one page. `requests` are the addresses it asked for, `complaints` what its
    console said and what scripts threw."""

    def __init__(self) -> None:
        if PROGRAM is None:
            pytest.skip("no Chromium is installed (Debian's package: chromium)")
        self._profile = tempfile.mkdtemp()
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        command = [sys.executable, "-c", _START, str(read), str(write), PROGRAM, *_FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile}"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._left, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, file: Path) -> None:
        """Open a page and wait until it has loaded."""
        self.requests.clear()
        self.complaints.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise, as if by a click."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key on what has the focus."""
        text = {"text": " "} if key == " " else {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Show pages in a window of that size and scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._from], [], [], 120)[0], "Chromium does not answer"
            data = os.read(self._from, 1 << 16)
            assert data, "Chromium ended"
            self._left += data
        message, self._left = self._left.split(b"\0", 1)
        message = json.loads(message)
        said = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(said))
        return message
