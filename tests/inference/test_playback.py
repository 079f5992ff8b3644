"""Playing: on a device, through a program, and on a machine that has neither."""

import os
import sys
import threading
import types
from contextlib import suppress

import numpy as np
import pytest
import torch

from fish_speech.inference import playback
from fish_speech.inference.playback import NoPlayback, Player

TONE = torch.linspace(-0.5, 0.5, 4410)[None]  # [1, n]


class Device:
    """Stands in for `sounddevice.OutputStream`: keeps what it is given."""

    heard: list[np.ndarray]
    failing = False

    def __init__(self, samplerate, channels, dtype):
        assert (samplerate, channels, dtype) == (44100, 1, "float32")
        type(self).heard, type(self).events = [], []
        self.gate = threading.Event()

    def start(self):
        self.events.append("start")

    def write(self, samples):
        if self.failing:
            raise OSError("the device was unplugged")
        self.heard.append(samples)

    def stop(self):
        self.events.append("stop")

    def close(self):
        self.events.append("close")

    def abort(self):
        self.events.append("abort")


@pytest.fixture
def device(monkeypatch):
    class Fresh(Device):
        pass

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(OutputStream=Fresh))
    return Fresh


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)


@pytest.fixture
def program(monkeypatch, tmp_path, no_device):
    """Makes an `aplay` that is the only program on the machine; its script is the argument."""

    def make(script, name="aplay"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))

    return make


def test_a_device_hears_everything_in_order_before_the_block_ends(device):
    with Player(44100) as player:
        player.write(TONE[:, :1000])
        player.write(TONE[:, 1000:])
    assert np.array_equal(np.concatenate(device.heard), TONE.T.numpy())
    assert device.events == ["start", "stop", "close"]
    assert player.failure is None


def test_an_interrupted_player_falls_silent(device):
    with suppress(KeyboardInterrupt), Player(44100) as player:
        player.write(TONE)
        raise KeyboardInterrupt
    assert device.events == ["start", "abort"]


def test_an_interrupted_program_ends_at_once(program):
    program("import time\ntime.sleep(60)")
    with suppress(KeyboardInterrupt), Player(44100) as player:
        player.write(TONE)
        raise KeyboardInterrupt
    assert player.failure is None


def test_a_device_that_fails_is_reported_and_raises_nothing(device):
    device.failing = True
    with Player(44100) as player:
        player.write(TONE)
    assert player.failure == "the device was unplugged"


def test_without_a_device_a_program_hears_16_bit_samples(program, tmp_path):
    heard, arguments = tmp_path / "heard", tmp_path / "arguments"
    program(
        f"open({str(heard)!r}, 'wb').write(sys.stdin.buffer.read())\n"
        f"open({str(arguments)!r}, 'w').write(' '.join(sys.argv[1:]))"
    )
    with Player(22050) as player:
        player.write(TONE)
    samples = np.frombuffer(heard.read_bytes(), "<i2") / 32767
    assert np.abs(samples - TONE[0].numpy()).max() < 1e-4
    assert "-r 22050" in arguments.read_text()
    assert player.failure is None


def test_a_program_that_fails_is_reported_with_its_own_words(program):
    program("sys.stdin.buffer.read(100)\nsys.exit('the device was unplugged')")
    with Player(44100) as player:
        for _ in range(50):
            player.write(TONE)
    assert player.failure == "aplay: the device was unplugged"


def test_a_program_that_finds_no_device_is_passed_over(program, tmp_path):
    program("sys.exit('cannot open audio device')")
    with pytest.raises(NoPlayback, match="aplay: cannot open audio device"):
        Player(44100)
    program(f"open({str(tmp_path / 'heard')!r}, 'wb').write(sys.stdin.buffer.read())", "play")
    with Player(44100) as player:
        player.write(TONE)
    assert player.failure is None
    assert (tmp_path / "heard").stat().st_size == 2 * TONE.shape[1]


def test_a_program_that_complains_on_and_on_blocks_nothing(program):
    program("while sys.stdin.buffer.read(2000): sys.stderr.write('underrun ' * 500)")
    with Player(44100) as player:
        for _ in range(50):
            player.write(TONE)
    assert player.failure is None


def test_a_machine_without_audio_is_said_to_be_one(monkeypatch, tmp_path, no_device):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(NoPlayback, match=r"no audio device .* none of these works: .*aplay"):
        Player(44100)


def test_every_known_program_is_told_the_sample_rate():
    assert all("{rate}" in command for command in playback.PLAYERS)
