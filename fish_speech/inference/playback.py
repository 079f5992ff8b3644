"""Play a waveform while it is made: sounddevice, or else a player program found on the machine."""

from __future__ import annotations

import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import numpy as np
import torch

# Programs that play raw 16-bit mono samples from standard input, at {rate} Hz.
PLAYERS = (
    "paplay --raw --format=s16le --channels=1 --rate={rate}",
    "aplay -q -t raw -f S16_LE -c 1 -r {rate} -",
    "ffplay -nodisp -autoexit -loglevel error -f s16le -ch_layout mono -ar {rate} -i -",
    "play -q -t raw -e signed -b 16 -c 1 -r {rate} -",
    "pw-play --format=s16 --channels=1 --rate={rate} --raw -",  # older ones know no --raw
)
_STARTUP_SECONDS = 0.2  # a program that finds no device has ended by then


class NoPlayback(Exception):
    """This machine can't play; the text says what was tried."""


class Player(AbstractContextManager):
    """Plays the waveforms given to `write`, in order, in a thread of its own.

    `write` returns at once: what is still to be heard is kept in memory (640 MB for an hour at
    44.1 kHz), for a file that is written too is to be whole early. Leaving the `with` block waits
    until all has been played; leaving it with an exception stops at once. The constructor raises
    `NoPlayback` on a machine without audio; a device that fails later sets `failure` to a message,
    and the rest is not played.
    """

    def __init__(self, sample_rate: int) -> None:
        self.failure: str | None = None
        self._play, self._finish, self._abort = _open_output(sample_rate)
        self._queue: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        self._thread.start()

    def write(self, waveform: torch.Tensor) -> None:
        """Append a waveform [1, n] (float, -1..1) to what is played."""
        self._queue.put(waveform.detach().reshape(-1).float().cpu().numpy())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stopped.set()
            self._abort()
        self._queue.put(None)
        try:
            self._thread.join()
        except BaseException:  # Ctrl+C while the rest is being heard
            self._stopped.set()
            self._abort()
            raise

    def _run(self) -> None:
        try:
            while (samples := self._queue.get()) is not None and not self._stopped.is_set():
                self._play(samples)
            if not self._stopped.is_set():
                self._finish()
        except Exception as error:  # whatever a driver raises: the file is still to be written
            if not self._stopped.is_set():
                self.failure = str(error) or type(error).__name__


Output = tuple[Callable[[np.ndarray], object], Callable[[], object], Callable[[], object]]


def _open_output(sample_rate: int) -> Output:
    """Functions that play samples [n] (float32), wait for the end, and stop at once."""
    try:
        return _open_device(sample_rate)
    except Exception as error:  # PortAudio missing, no device, or a rate that it can't do
        reasons = [str(error).splitlines()[0]]
    for command in PLAYERS:
        program, *arguments = command.format(rate=sample_rate).split()
        if shutil.which(program):
            try:
                return _open_program([program, *arguments])
            except OSError as error:
                reasons.append(str(error))
    programs = ", ".join(command.split()[0] for command in PLAYERS)
    raise NoPlayback(
        f"no audio device ({'; '.join(reasons)}), and none of these works: {programs} (on Debian "
        "and Ubuntu: apt install libportaudio2)"
    )


def _open_device(sample_rate: int) -> Output:
    import sounddevice

    stream = sounddevice.OutputStream(samplerate=sample_rate, channels=1, dtype="float32")
    stream.start()

    def finish() -> None:
        stream.stop()  # waits for what is buffered
        stream.close()

    return lambda samples: stream.write(samples[:, None]), finish, stream.abort


def _open_program(command: list[str]) -> Output:
    """Raises `OSError` where the program ends at once: it finds no device."""
    messages = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe would fill, and stop it)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages
    )

    def play(samples: np.ndarray) -> None:
        try:
            process.stdin.write((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
            process.stdin.flush()
        except BrokenPipeError:
            finish()

    def finish() -> None:
        process.communicate()
        messages.seek(0)
        with messages:
            output = messages.read()
        last = output.decode(errors="replace").strip().splitlines()[-1:]
        if process.returncode:
            raise OSError(f"{command[0]}: {(last or ['no reason given'])[0]}")

    def abort() -> None:
        process.kill()
        with suppress(OSError, ValueError):  # the other thread may be writing still
            process.communicate()
        messages.close()

    with suppress(subprocess.TimeoutExpired):
        process.wait(_STARTUP_SECONDS)
        finish()
    return play, finish, abort
