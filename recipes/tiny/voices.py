"""Who speaks: flite's voices as they are, each with a name, and many unnamed ones made of them.

A model that knows three voices has no idea of another one: it has to forget how to read in order
to change its voice. Between many it finds its way to a new one. The voice `rms` is left out on
purpose: the demo teaches it.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import soundfile

from fish_speech.audio import resample

SAMPLE_RATE = 16000
VOICES = {"SLT": "slt", "KAL": "kal16", "AWB": "awb"}  # name in the prompt: voice of flite
# Pitches in Hz and formants to which a voice can be moved and still be understood; any pace.
_RANGES = {
    "slt": ((95, 230), (0.86, 1.08)),
    "kal16": ((75, 150), (0.94, 1.16)),
    "awb": ((80, 200), (0.94, 1.16)),
}
_PACES = (0.88, 1.15)
_SPEEDS = (0.8, 1.25)  # of a disguise
_BANDS, _GAIN = 12, 12.0  # of its filter, equally wide in mels, and the most in dB
_LEVELS = (-12.0, 4.0)  # of its peak against that of the speech, in dB


@dataclass(frozen=True)
class Voice:
    """A voice of flite, its mean pitch in Hz, and how much higher its formants lie (a shorter
    vocal tract) and how much faster it speaks than flite's."""

    flite: str
    pitch: float | None = None
    tract: float = 1.0
    pace: float = 1.0


def _unnamed(count: int) -> dict[str, Voice]:
    draw, voices = random.Random(0), {}
    for number, flite in enumerate(islice(cycle(_RANGES), count)):
        pitches, tracts = _RANGES[flite]
        tract = round(draw.uniform(*tracts), 2)
        voice = Voice(flite, draw.uniform(*pitches), tract, draw.uniform(*_PACES))
        voices[f"unnamed-{number:02d}"] = voice
    return voices


UNNAMED = _unnamed(48)


def speak(text: str, speaker: str) -> np.ndarray:
    """Speak `text` by one of `VOICES`, of `UNNAMED` or another of flite's: float32 [N] at 16 kHz,
    trimmed to 50 ms before and 100 ms after."""
    voice = UNNAMED.get(speaker) or Voice(VOICES.get(speaker, speaker))
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice.flite, "-t", text, "-o", file.name]
        if voice.pitch:
            # Played faster by `tract` below, which raises pitch and formants and shortens.
            command += ["--setf", f"int_f0_target_mean={voice.pitch / voice.tract:.1f}"]
            command += ["--setf", f"duration_stretch={voice.tract / voice.pace:.3f}"]
        subprocess.run(command, check=True, capture_output=True)
        samples, sample_rate = soundfile.read(file.name, dtype="float32")
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"flite spoke at {sample_rate} Hz instead of {SAMPLE_RATE}")
    return trim(resample(samples, round(SAMPLE_RATE * voice.tract), SAMPLE_RATE))


def trim(samples: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """Cut silence (below `threshold` of the peak) to 50 ms before the speech and 100 ms after."""
    level = np.abs(samples)
    loud = np.flatnonzero(level > threshold * level.max(initial=0.0))
    if len(loud) == 0:
        return samples
    first, last = loud[0] - SAMPLE_RATE // 20, loud[-1] + SAMPLE_RATE // 10
    return samples[max(0, first) : last]


def disguise(samples: np.ndarray, generator: random.Random) -> np.ndarray:
    """Speech [N] at 16 kHz as somebody else might have said it elsewhere: played at another speed,
    which moves pitch and formants, through a filter that makes a voice darker, brighter or hollow,
    and louder or softer."""
    speed = generator.uniform(*_SPEEDS)
    gains = [generator.uniform(-_GAIN, _GAIN) for _ in range(_BANDS)]
    moved = resample(samples, round(SAMPLE_RATE * speed), SAMPLE_RATE)
    frequencies = np.fft.rfftfreq(len(moved), 1 / SAMPLE_RATE)
    mels = np.log1p(frequencies / 700)
    bands = np.linspace(0, np.log1p(SAMPLE_RATE / 2 / 700), _BANDS)
    spectrum = np.fft.rfft(moved) * 10 ** (np.interp(mels, bands, gains) / 20)
    filtered = np.fft.irfft(spectrum, len(moved)).astype(np.float32)
    peak = np.abs(samples).max() * 10 ** (generator.uniform(*_LEVELS) / 20)
    return filtered * (min(peak, 1.0) / max(np.abs(filtered).max(), 1e-9))
