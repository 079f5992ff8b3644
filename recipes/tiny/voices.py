"""Who speaks: flite's voices as they are, each with a name, and any number of unnamed ones.

A model that knows three voices has no idea of another one: it has to forget how to read in order
to change its voice. Between thousands it finds its way to a new one. Strangers speak with other
programs: all of them to the codec, those that read English, disguised, to the transformer too. The
voice `rms` is left out on purpose: the demo teaches it.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass

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
# A codec of few speakers codes no other. Foreigners read English as if it were their own language.
_ENGLISH = ("festival/ked_diphone", "festival/cmu_us_slt_arctic_hts")
_FOREIGN = (
    *("lp_diphone", "pc_diphone", "czech_dita", "czech_krb", "czech_machac", "czech_ph"),
    *("hy_fi_mv_diphone", "suo_fi_lj_diphone", "msu_ru_nsh_clunits", "upc_ca_ona_hts"),
)
_ESPEAK = (
    *("adam", "Andy", "anika", "antonio", "Denis", "f2"),
    *("f4", "Gene", "linda", "m3", "m7", "zac"),
)
_FORMANT = tuple(f"espeak-ng/en+{voice}" for voice in _ESPEAK)
STRANGERS = (*_ENGLISH, *(f"festival/{voice}" for voice in _FOREIGN), *_FORMANT)
_BANDS, _GAIN = 12, 12.0  # of a filter, equally wide in mels, and the most in dB
_LEVELS = (-12.0, 4.0)  # of a changed voice's peak, in dB
_SPEEDS = (0.8, 1.25)  # of a disguise


@dataclass(frozen=True)
class Filter:
    """A filter's gains in dB, and the change of the peak's level in dB."""

    gains: tuple[float, ...]
    level: float

    @classmethod
    def draw(cls, generator: random.Random) -> Filter:
        gains = tuple(generator.uniform(-_GAIN, _GAIN) for _ in range(_BANDS))
        return cls(gains, generator.uniform(*_LEVELS))

    def apply(self, samples: np.ndarray) -> np.ndarray:
        """Speech [N] at 16 kHz darker, brighter or hollow, louder or softer."""
        mels = np.log1p(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) / 700)
        bands = np.linspace(0, np.log1p(SAMPLE_RATE / 2 / 700), _BANDS)
        spectrum = np.fft.rfft(samples) * 10 ** (np.interp(mels, bands, self.gains) / 20)
        filtered = np.fft.irfft(spectrum, len(samples)).astype(np.float32)
        peak = np.abs(samples).max() * 10 ** (self.level / 20)
        return filtered * (min(peak, 1.0) / max(np.abs(filtered).max(), 1e-9))


@dataclass(frozen=True)
class Voice:
    """A voice of flite, and for one made of it: its mean pitch in Hz, how much higher its formants
    lie (a shorter vocal tract), how much faster it speaks, and its filter."""

    flite: str
    pitch: float | None = None
    tract: float = 1.0
    pace: float = 1.0
    filter: Filter | None = None


def unnamed_speaker(number: int) -> str:
    """The speaker that `speak` takes for an unnamed voice (0, 1, ...)."""
    return f"unnamed-{number:05d}"


def disguised_speaker(number: int) -> str:
    """The speaker that `speak` takes for a disguised stranger (0, 1, ...)."""
    return f"disguised-{number:05d}"


def voice_of(speaker: str) -> Voice:
    """A named voice, an unnamed one or another of flite's, as it is."""
    if not speaker.startswith("unnamed-"):
        return Voice(VOICES.get(speaker, speaker))
    draw = random.Random(speaker)
    flite = draw.choice(list(_RANGES))
    pitches, tracts = _RANGES[flite]
    tract, pace = round(draw.uniform(*tracts), 2), draw.uniform(*_PACES)
    return Voice(flite, draw.uniform(*pitches), tract, pace, Filter.draw(draw))


def speak(text: str, speaker: str) -> np.ndarray:
    """Speak `text` by one of `VOICES` or `STRANGERS`, an unnamed voice, a disguised stranger or
    another of flite's voices: float32 [N] at 16 kHz, trimmed to 50 ms before and 100 ms after."""
    if speaker.startswith("disguised-"):
        draw = random.Random(speaker)
        stranger = draw.choice(draw.choice((_ENGLISH, _FORMANT)))
        return disguise(speak(text, stranger), draw)
    program, _, stranger = speaker.rpartition("/")
    if program == "festival":
        return trim(_spoken(["text2wave", "-eval", f"(voice_{stranger})", "-o"], text))
    if program == "espeak-ng":
        return trim(_spoken(["espeak-ng", "-v", stranger, "--stdin", "-w"], text))
    voice = voice_of(speaker)
    command = ["flite", "-voice", voice.flite]
    if voice.pitch:
        # Played faster by `tract` afterwards, which raises pitch and formants and shortens.
        command += ["--setf", f"int_f0_target_mean={voice.pitch / voice.tract:.1f}"]
        command += ["--setf", f"duration_stretch={voice.tract / voice.pace:.3f}"]
    samples = trim(_spoken([*command, "-t", text, "-o"], speed=voice.tract))
    return voice.filter.apply(samples) if voice.filter else samples


def _spoken(command: list[str], text: str = "", *, speed: float = 1.0) -> np.ndarray:
    """What a program says that gets `text` as its input and the name of a file last: [N] at 16 kHz,
    played so much faster."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*command, file.name], input=text.encode(), check=True, capture_output=True)
        samples, sample_rate = soundfile.read(file.name, dtype="float32")
    return resample(samples, round(sample_rate * speed), SAMPLE_RATE)


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
    which moves pitch and formants, and through another filter."""
    speed = generator.uniform(*_SPEEDS)
    moved = resample(samples, round(SAMPLE_RATE * speed), SAMPLE_RATE)
    return Filter.draw(generator).apply(moved)
