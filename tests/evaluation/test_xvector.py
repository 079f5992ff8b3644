"""Speaker encoders of the hub: a small random one, loaded by the real library from a stub."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from fish_speech.evaluation.speaker import SAMPLE_RATE, similarity
from fish_speech.evaluation.xvector import load_encoder
from tests.conftest import hub_settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def wave():
    """Three seconds of a humming voice."""
    time = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    sum_ = sum(np.sin(2 * np.pi * 120 * k * time + k) / k for k in range(1, 20))
    return (0.1 * sum_ * (0.6 + 0.4 * np.sin(9 * time))).astype(np.float32)


def test_a_folder_gives_unit_vectors_and_silence_has_no_voice(xvector_folder, wave):
    encoder = load_encoder(str(xvector_folder), "cpu")
    vector = encoder.embed(wave)
    assert encoder.identity == "small-sv"
    assert vector.shape == (32,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert similarity(vector, encoder.embed(wave * 0.1)) > 0.999  # level is no matter
    assert similarity(vector, encoder.embed(wave[::-1].copy())) < 0.9999
    assert encoder.embed(wave[:400]) is not None  # shorter than the model can take
    assert encoder.embed(np.zeros(16_000, np.float32)) is None


def test_weights_as_older_models_have_them_give_the_same_vectors(xvector_folder, tmp_path, wave):
    """Pickled, the weight norm in its older spelling: as the suggested model is published."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(xvector_folder / "model.safetensors")
    old = {"original0": "weight_g", "original1": "weight_v"}
    for name in list(weights):
        head, _, last = name.rpartition(".parametrizations.weight.")
        if last in old:
            weights[f"{head}.{old[last]}"] = weights.pop(name)
    del weights["objective.weight"]  # of use in training only
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((xvector_folder / name).read_bytes())
    vector = load_encoder(str(tmp_path), "cpu").embed(wave)
    expected = load_encoder(str(xvector_folder), "cpu").embed(wave)
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_without_a_name_the_repository_s_own_listens():
    assert load_encoder().identity == "Resemblyzer 0.1.4"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (None, "model_type"),
        ({"model_type": "dual_ar"}, "dual_ar"),
        ({"sampling_rate": 8000}, "listens at 8000 Hz"),
        ({"num_hidden_layers": 3}, "its weights lack wavlm.encoder.layers.2"),
    ],
)
def test_what_is_no_speaker_encoder_is_refused_with_the_remedy(
    xvector_folder, tmp_path, broken, reason
):
    for file in xvector_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if broken is None:
        (tmp_path / "config.json").unlink()
    else:
        name = "preprocessor_config.json" if "sampling_rate" in broken else "config.json"
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | broken))
    with pytest.raises(ValueError, match="wavlm-base-plus-sv") as caught:
        load_encoder(str(tmp_path), "cpu")
    assert f"--speaker-encoder {tmp_path}: " in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fish_speech.evaluation.xvector.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install transformers"):
        load_encoder("microsoft/wavlm-base-plus-sv")


class _Hub(BaseHTTPRequestHandler):
    """Files of one repository, with the headers that the client reads."""

    def do_HEAD(self) -> None:
        self._send(body=False)

    def do_GET(self) -> None:
        self._send(body=True)

    def _send(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        file = self.server.folder / name
        known = path in (f"/stub/sv/resolve/{part}/{name}" for part in ("main", COMMIT))
        data = file.read_bytes() if known and file.is_file() else b""
        self.send_response(200 if data else 404)
        if not data:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}-{len(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


def load_from(endpoint, home, **environment):
    """Its identity, or the error, in a process of its own: settings are read at import."""
    code = (
        "import sys; from fish_speech.evaluation.xvector import load_encoder\n"
        "try: print(load_encoder('stub/sv', 'cpu').identity)\n"
        "except ValueError as error: sys.exit(f'error: {error}')"
    )
    settings = hub_settings(endpoint, home, **environment)
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_it_is_downloaded_once_and_its_commit_is_named(xvector_folder, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as hub:
        hub.folder = xvector_folder
        Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        first = load_from(endpoint, tmp_path)
        hub.shutdown()
    assert first.stdout == "stub/sv, commit 01234567\n", first.stderr
    again = load_from(endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout, again.stderr
    absent = load_from(endpoint, tmp_path / "other", HF_HUB_OFFLINE="1")
    assert absent.returncode == 1
    assert absent.stderr.splitlines()[-1].startswith("error: --speaker-encoder stub/sv: ")
    assert "wavlm-base-plus-sv" in absent.stderr.splitlines()[-1]
