"""Log-mel spectrogram of the codec."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LINEAR_HZ, _LINEAR_MELS = 1000.0, 15.0  # below 1 kHz Slaney's scale is linear: 200/3 Hz a mel
_LOG_STEP = math.log(6.4) / 27.0


class LogMelSpectrogram(nn.Module):
    """waveform [B, 1, N] -> log-mel [B, n_mels, N // hop_length].

    Hann window, magnitudes, Slaney mel scale and norm from 0 to sample_rate / 2, natural log.
    """

    def __init__(
        self, sample_rate: int, n_mels: int, n_fft: int, hop_length: int, win_length: int
    ) -> None:
        super().__init__()
        self.sample_rate, self.n_fft, self.hop_length = sample_rate, n_fft, hop_length
        self.win_length = win_length
        self.padding = ((win_length - hop_length) // 2, (win_length - hop_length + 1) // 2)
        self.n_mels = n_mels
        # Built at first use: on the meta device, where models are made, they would be empty.
        self._constants: tuple[Tensor, Tensor] | None = None

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`lengths [B]` (samples): each waveform is mirrored at its own end, so that a waveform
        gives the same frames in a batch as by itself. What lies beyond its end is undefined.
        """
        waveforms = waveforms[:, 0].float()  # [B, N]
        if waveforms.shape[1] <= max(self.padding):  # too short to be mirrored
            waveforms = F.pad(waveforms, (0, max(self.padding) + 1 - waveforms.shape[1]))
        padded = self._mirror(waveforms, lengths)
        window, filters = self._window_and_filters(waveforms.device)
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            self.win_length,
            window,
            center=False,
            return_complex=True,
        )  # [B, n_fft/2 + 1, frames]
        magnitudes = (torch.view_as_real(spectrum).square().sum(-1) + 1e-6).sqrt()
        return (filters @ magnitudes).clamp(min=1e-5).log()

    def _mirror(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return F.pad(waveforms, self.padding, mode="reflect")
        left, right = self.padding
        last = lengths.to(waveforms.device).clamp(min=1)[:, None] - 1
        index = torch.arange(-left, waveforms.shape[1] + right, device=waveforms.device).abs()
        index = torch.where(index <= last, index, (2 * last - index).clamp(min=0))
        return waveforms.gather(1, index)

    def _window_and_filters(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._constants is None or self._constants[0].device != device:
            filters = mel_filters(self.sample_rate, self.n_fft, self.n_mels)
            window = torch.hann_window(self.win_length)
            self._constants = (window.to(device), filters.to(device))
        return self._constants


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangular Slaney filters of equal area: [n_mels, n_fft/2 + 1]."""
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    mels = torch.linspace(0, _hz_to_mel(sample_rate / 2), n_mels + 2, dtype=torch.float64)
    edges = _mel_to_hz(mels)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - lower) / (centre - lower)
    falling = (upper - frequencies) / (upper - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (upper - lower)).float()


def _hz_to_mel(hz: float) -> float:
    if hz < _LINEAR_HZ:
        return hz * _LINEAR_MELS / _LINEAR_HZ
    return _LINEAR_MELS + math.log(hz / _LINEAR_HZ) / _LOG_STEP


def _mel_to_hz(mels: Tensor) -> Tensor:
    linear = mels * _LINEAR_HZ / _LINEAR_MELS
    logarithmic = _LINEAR_HZ * torch.exp(_LOG_STEP * (mels - _LINEAR_MELS))
    return torch.where(mels < _LINEAR_MELS, linear, logarithmic)
