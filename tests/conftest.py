"""Shared by all tests: the golden numbers and what is loaded from them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fish_speech.models.text2semantic import load_model
from fish_speech.models.vqgan import load_codec
from fish_speech.tokenizer import FishTokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach out
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for CUDA are tried out on the CPU


def golden_tensors(name: str) -> dict:
    """The content of a golden `.pt` file."""
    return torch.load(GOLDEN / name, weights_only=True)


def hub_settings(endpoint: str, home: Path, **environment: str) -> dict[str, str]:
    """The environment of a process that finds a stub at `endpoint` in the hub's place."""
    return {
        **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        **environment,
    }


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """Of tests that a shell started in the background, or under nohup, all would ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tokenizer() -> FishTokenizer:
    return FishTokenizer.from_pretrained(GOLDEN / "model")


@pytest.fixture
def model():
    """The golden model, fresh, so that a test may change it."""
    return load_model(GOLDEN / "model")


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory) -> Path:
    """A folder with the golden codec under the names of a model directory."""
    folder = tmp_path_factory.mktemp("codec")
    shutil.copy(GOLDEN / "codec.pth", folder / "firefly-gan-vq-golden.pth")
    shutil.copy(GOLDEN / "codec.json", folder / "codec_config.json")
    return folder


@pytest.fixture(scope="session")
def codec(codec_dir):
    return load_codec(codec_dir)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, codec_dir) -> Path:
    """A whole model directory: the golden model and the golden codec."""
    folder = tmp_path_factory.mktemp("base") / "golden"
    shutil.copytree(GOLDEN / "model", folder)
    for file in codec_dir.iterdir():
        shutil.copy(file, folder)
    return folder
