"""The log-mel spectrogram of a recording as a small PNG, transparent where it is silent."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from fish_speech.audio import load_audio
from fish_speech.models.vqgan.spectrogram import LogMelSpectrogram

_RATE, _WINDOW, _HOP = 16_000, 1024, 400  # a column is 25 ms
_BANDS = 48  # rows, up to 8 kHz
_RANGE_DB = 60.0  # from the loudest to what leaves no ink
_INK = (0x2E, 0x86, 0xC1)  # a blue that shows on white and on black
_SHADES = 16


def spectrogram_png(file: str | Path) -> bytes:
    """The picture of a file, 48 rows and 40 columns a second. Raises as `load_audio`."""
    waveform, _ = load_audio(file, _RATE)  # [1, N]
    waveform = F.pad(waveform, (0, max(0, _WINDOW - waveform.shape[1])))
    mel = _transform()(waveform[None])[0].numpy()  # [48, T], natural logs of magnitudes
    loudest = max(mel.max(), np.log(0.1))  # silence stays without ink
    level = 20 / np.log(10) * (mel - loudest) / _RANGE_DB + 1  # [48, T], at most 1
    shades = level.clip(0, 1) * (_SHADES - 1)
    return _png(shades[::-1].round().astype(np.uint8))  # low pitches at the bottom


@lru_cache(maxsize=1)
def _transform() -> LogMelSpectrogram:
    return LogMelSpectrogram(_RATE, _BANDS, n_fft=_WINDOW, hop_length=_HOP, win_length=_WINDOW)


def _png(shades: np.ndarray) -> bytes:
    """Opacities [rows, columns] from 0 to 15 as a PNG of 4 bits a pixel."""
    rows, columns = shades.shape
    even = np.pad(shades, ((0, 0), (0, columns % 2)))
    packed = even[:, ::2] << 4 | even[:, 1::2]  # two pixels a byte
    lines = np.pad(packed, ((0, 0), (1, 0)))  # each line begins with its filter, 0 for none
    opacity = bytes(round(255 * shade / (_SHADES - 1)) for shade in range(_SHADES))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 4, 3, 0, 0, 0)),  # 3: by a palette
        (b"PLTE", bytes(_INK) * _SHADES),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
