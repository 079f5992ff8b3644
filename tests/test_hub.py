"""The registry, the check of a model directory, and downloads by the real client from a stub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fish_speech.hub import (
    CODEC_PATTERN,
    MODEL_FILES,
    check_model_dir,
    directory_of,
    find_model,
    local_model,
    model_versions,
)
from tests.conftest import hub_settings

CODEC = "firefly-gan-vq-stub.pth"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The client hands its data on in blocks of 10 MiB: what is to be resumed must be larger.
WEIGHTS = bytes(range(256)) * (22 << 12)
FILES = {
    "config.json": b'{"model_type": "dual_ar"}',
    "special_tokens.json": b"{}",
    "tokenizer.tiktoken": b"IQ== 0\n",
    CODEC: b"codec" * 100,
    "model.pth": WEIGHTS,
}


class StubHub(ThreadingHTTPServer):
    """A hub with one repository, whose faults a test sets: it counts what was asked of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StubHandler)
        self.files = dict(FILES)
        self.sizes = {name: len(data) for name, data in FILES.items()}  # as the metadata says
        self.refusal: tuple[int, str] | None = None  # status and error code of the metadata
        self.break_off_at: int | None = None  # bytes of model.pth after which it is gone
        self.requests: list[tuple[str, str | None]] = []  # file and Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def metadata(self) -> dict:
        siblings = []
        for name, data in FILES.items():
            file = {"rfilename": name, "size": self.sizes[name], "blobId": "b" * 40}
            if name.endswith(".pth"):  # large files carry a checksum
                digest = hashlib.sha256(data).hexdigest()
                file["lfs"] = {"sha256": digest, "size": self.sizes[name], "pointerSize": 134}
            siblings.append(file)
        return {"id": "stub/voice", "sha": COMMIT, "siblings": siblings}


class _StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/stub/voice/revision/main":
            if self.server.refusal:
                status, code = self.server.refusal
                self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
            else:
                self._answer(200, json.dumps(self.server.metadata()).encode())
        elif (name := path.removeprefix(f"/stub/voice/resolve/{COMMIT}/")) in self.server.files:
            self._send_file(name, self.server.files[name])
        else:
            self._answer(404, b"")

    def _send_file(self, name: str, data: bytes) -> None:
        wanted = self.headers.get("Range")
        first_time = name not in [asked for asked, _ in self.server.requests]
        self.server.requests.append((name, wanted))
        breaks_off = name == "model.pth" and self.server.break_off_at is not None
        if breaks_off and not first_time:
            self._answer(503, b"")
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        end = self.server.break_off_at if breaks_off else None
        self._answer(206 if wanted else 200, data[start:], headers, end)
        self.close_connection = breaks_off

    def _answer(self, status: int, body: bytes, headers=(), end: int | None = None) -> None:
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:end])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def stub_hub():
    with StubHub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose registry has one published version, `voice`."""
    registry = tmp_path / "configs" / "model"
    registry.mkdir(parents=True)
    lines = [
        "name: voice",
        "description: a stub",
        "directory: checkpoints/voice",
        "repo_id: stub/voice",
        "revision: main",
        "licence: none",
        "files:",
        *(f"  {name}: {min(len(data), 1000)}" for name, data in FILES.items()),
    ]
    (registry / "voice.yaml").write_text("\n".join(lines))
    return tmp_path


def download(root: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess:
    """`find_model` in a fresh process, since the client reads its settings when it is imported."""
    code = (
        "import sys; from pathlib import Path; from fish_speech.hub import find_model\n"
        "try: print(find_model('voice', Path('.').resolve()))\n"
        "except (ValueError, FileNotFoundError) as error: sys.exit(f'error: {error}')"
    )
    settings = hub_settings(endpoint, root / "hf_home", **environment)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=settings,
        capture_output=True,
        text=True,
        timeout=60,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def error_of(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :].strip()


def test_registry_names_the_published_and_the_embedded_model():
    versions = model_versions()
    assert list(versions) == ["1.5", "tiny"]
    assert versions["1.5"].repo_id == "fishaudio/fish-speech-1.5"
    assert versions["1.5"].licence == "CC-BY-NC-SA-4.0"
    assert versions["tiny"].repo_id is None
    for version in versions.values():
        assert set(MODEL_FILES) < set(version.files)
        assert sum(Path(name).match(CODEC_PATTERN) for name in version.files) == 1


def test_registry_refuses_an_unknown_key(root):
    with (root / "configs" / "model" / "voice.yaml").open("a") as file:
        file.write("\nsize: 3\n")
    with pytest.raises(Exception, match="size"):
        model_versions(root)


def test_full_download_then_nothing_more_is_asked(root, stub_hub):
    result = download(root, stub_hub.url, TQDM_POSITION="-1")  # bars even where stderr is piped
    assert result.returncode == 0, result.stderr
    directory = root / "checkpoints" / "voice"
    assert result.stdout.strip() == str(directory)
    assert contents(directory) == FILES
    assert re.search(r"model\.pth: 100%", result.stderr)

    stub_hub.requests.clear()
    assert find_model("voice", root) == directory == local_model("voice", root)
    assert stub_hub.requests == []


def test_broken_off_download_goes_on_where_it_stopped(root, stub_hub):
    stub_hub.break_off_at = 15 << 20
    error = error_of(download(root, stub_hub.url))
    assert "status 503" in error
    assert "\n" not in error
    directory = root / "checkpoints" / "voice"
    assert not (directory / "model.pth").exists()
    assert local_model("voice", root) is None
    with pytest.raises(FileNotFoundError, match=r"lacks model\.pth"):
        check_model_dir(directory)

    stub_hub.break_off_at = None
    result = download(root, stub_hub.url)
    assert result.returncode == 0, result.stderr
    assert contents(directory) == FILES
    # The first answer broke off, the client tried again by itself, and so did the second process.
    resumed = ("model.pth", f"bytes={10 << 20}-")
    assert stub_hub.requests[-3:] == [("model.pth", None), resumed, resumed]
    assert len(stub_hub.requests) == len(FILES) + 2  # whole files were not asked for again


def test_files_of_a_wrong_size_are_downloaded_again(root, stub_hub):
    directory = root / "checkpoints" / "voice"
    directory.mkdir(parents=True)
    (directory / "model.pth").write_bytes(WEIGHTS[:5])
    (directory / CODEC).write_bytes(FILES[CODEC] + b"more")
    (directory / "config.json").write_bytes(FILES["config.json"])
    result = download(root, stub_hub.url)
    assert result.returncode == 0, result.stderr
    assert contents(directory) == FILES
    assert "config.json" not in dict(stub_hub.requests)


@pytest.mark.parametrize(
    ("served", "complaint"),
    [(FILES[CODEC][:-7], "wrong size, 493 bytes instead of 500"), (b"x" * 500, "wrong content")],
)
def test_a_file_unlike_its_metadata_is_refused(root, stub_hub, served, complaint):
    stub_hub.files[CODEC] = served
    error = error_of(download(root, stub_hub.url))
    assert error.startswith(f"error: {CODEC}: the download has the {complaint}")
    assert not list((root / "checkpoints" / "voice").glob("firefly*"))


def test_a_full_disk_is_noticed_before(root, stub_hub):
    stub_hub.sizes["model.pth"] = 10**17
    error = error_of(download(root, stub_hub.url))
    assert "needs 100000000.0 GB" in error
    assert stub_hub.requests == []


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, ""), ["refuses access (401)", "hf auth login"]),
        ((403, "GatedRepo"), ["asks for consent", "hf auth login"]),
        ((404, "RepoNotFound"), ["not found (404)", "HF_ENDPOINT"]),
        ((404, "RevisionNotFound"), ["not found (404)", "revision main"]),
    ],
)
def test_refusals_are_one_line(root, stub_hub, refusal, said):
    stub_hub.refusal = refusal
    error = error_of(download(root, stub_hub.url))
    assert "\n" not in error
    assert f"{stub_hub.url}/stub/voice" in error
    assert all(words in error for words in said)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_offline_says_what_to_do(root, offline):
    with StubHub() as server:  # bound but closed at once: nobody listens at its address
        endpoint = server.url
    error = error_of(download(root, endpoint, HF_HUB_OFFLINE=offline))
    assert ("HF_HUB_OFFLINE is set" in error) == (offline == "1")
    where = os.path.join("checkpoints", "voice")
    command = f"hf download stub/voice {' '.join(FILES)} --local-dir {where}"
    for words in (endpoint, command, "--model-version tiny", "--model-path tiny"):
        assert words in error


def test_unknown_version_lists_the_known():
    with pytest.raises(FileNotFoundError, match=r"1\.6: neither a model version \(1\.5, tiny\)"):
        find_model("1.6")


def test_embedded_model_is_never_downloaded(root):
    registry = root / "configs" / "model" / "voice.yaml"
    registry.write_text(registry.read_text().replace("repo_id: stub/voice", "repo_id: null"))
    with pytest.raises(FileNotFoundError, match=r"git checkout -- checkpoints/voice"):
        find_model("voice", root)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(b"{}")
    return folder


def test_complete_directory_is_accepted_as_path(model_dir):
    assert find_model(model_dir) == model_dir


@pytest.mark.parametrize("name", FILES)
def test_missing_and_empty_files_are_named(model_dir, name):
    named = CODEC_PATTERN if name == CODEC else name
    (model_dir / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=re.escape(named)):
        check_model_dir(model_dir)
    (model_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(named)):
        check_model_dir(model_dir)


def test_two_codecs_are_refused(model_dir):
    (model_dir / "firefly-gan-vq-other.pth").write_bytes(b"{}")
    with pytest.raises(ValueError, match="more than one codec"):
        check_model_dir(model_dir)


def test_what_is_no_directory_is_told_apart(model_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        check_model_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"give the folder, {re.escape(str(model_dir))}"):
        check_model_dir(model_dir / "model.pth")
    with pytest.raises(ValueError, match="the codec alone"):
        check_model_dir(model_dir / CODEC)


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step_000000100.ckpt"])
def test_unmerged_run_says_how_to_merge(tmp_path, given):
    run = tmp_path / "results" / "my_voice"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_000000100.ckpt").write_bytes(b"adapter")
    with pytest.raises(ValueError, match="--project my_voice --merge-weights"):
        check_model_dir(run / given)


def test_a_project_s_name_leads_to_its_merged_model(tmp_path):
    (tmp_path / "checkpoints" / "me-merged").mkdir(parents=True)
    for name in ("me", "me-merged"):
        with pytest.raises(FileNotFoundError, match=r"; there is checkpoints/me-merged$"):
            directory_of(name, tmp_path)
