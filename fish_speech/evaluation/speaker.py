"""How alike two voices are: a network that turns speech into a speaker embedding.

The encoder is that of Resemblyzer 0.1.4 (GE2E, Apache-2.0), an LSTM over 40 mel bands at 16 kHz.
Its weights come with this repository, in fp16, because its wheel can't be installed without a
compiler; `recipes/speaker` takes them out of that wheel.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.hub import REPOSITORY
from fish_speech.models.vqgan.spectrogram import mel_filters
from fish_speech.models.weights import assign_strictly, empty_modules, read_state_dict

SAMPLE_RATE = 16_000
SPEAKER_DIR = REPOSITORY / "checkpoints" / "speaker"
_WINDOW, _HOP, _MELS = 400, 160, 40  # 25 ms, 10 ms
_PART_FRAMES, _PART_STEP = 160, 77  # 1.6 s, 1.3 parts a second
_MIN_COVERAGE = 0.75  # of the last part, below which it doesn't count
SILENCE_RMS = 1e-5  # up to which there is no voice
_TARGET_RMS = 10 ** (-30 / 20)  # that all speech is scaled to


class SpeakerEncoder(nn.Module):
    """Mel spectrograms [B, 160, 40] -> unit vectors [B, 256]."""

    identity = "Resemblyzer 0.1.4"

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_MELS, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    @classmethod
    def from_pretrained(cls, file: str | Path = SPEAKER_DIR / "encoder.pth") -> SpeakerEncoder:
        """Load the weights. Raises `FileNotFoundError` or `ValueError` that names the file."""
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: the speaker encoder is missing; it is part of the repository: "
                f"'git checkout -- {SPEAKER_DIR.relative_to(REPOSITORY)}' brings it back"
            )
        with empty_modules():
            encoder = cls()
        assign_strictly(encoder, read_state_dict(file), file)
        return encoder.float().eval()

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=-1)

    @torch.no_grad()
    def embed(self, samples: np.ndarray) -> np.ndarray | None:
        """The speaker embedding of speech [N] (float32, 16 kHz): a unit vector [256]; None for
        silence."""
        if not (loudness := rms(samples)) > SILENCE_RMS:
            return None
        waveform = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
        mels = _mels(F.pad(waveform * (_TARGET_RMS / loudness), (0, _padding(len(samples)))))
        vectors = self(mels.unfold(0, _PART_FRAMES, _PART_STEP).transpose(1, 2))
        return F.normalize(vectors.mean(0), dim=0).numpy()


def rms(samples: np.ndarray) -> float:
    """Root mean square of samples [N]; 0 where there are none."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two embeddings."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def stranger_clips() -> list[Path]:
    """Clips of speakers that no dataset has, to tell what similarity another speaker reaches."""
    return sorted(SPEAKER_DIR.glob("strangers/*"))


def _padding(count: int) -> int:
    """Samples of silence to add, so that whole parts cover `count` samples."""
    parts = 1 + max(0, -(-(count // _HOP + 1 - _PART_FRAMES) // _PART_STEP))
    covered = (count // _HOP + 1 - (parts - 1) * _PART_STEP) / _PART_FRAMES
    if parts > 1 and covered < _MIN_COVERAGE:
        parts -= 1
    frames = (parts - 1) * _PART_STEP + _PART_FRAMES
    return max(0, frames * _HOP - count)


def _mels(waveform: Tensor) -> Tensor:
    """Power mel spectrogram: waveform [N] -> [N // 160 + 1, 40]."""
    spectrum = torch.stft(
        waveform,
        _WINDOW,
        _HOP,
        window=torch.hann_window(_WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    return (_mel_filters() @ torch.view_as_real(spectrum).square().sum(-1)).T


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    return mel_filters(SAMPLE_RATE, _WINDOW, _MELS)
