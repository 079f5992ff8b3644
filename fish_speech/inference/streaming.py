"""Streaming waveforms: decode frames while they are generated, cut silence at both ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fish_speech.models.vqgan import Codec
from fish_speech.models.vqgan.codec import DAMAGED
from fish_speech.models.vqgan.firefly import ConvState

# Frames of a block: short ones first, so that speech is heard soon; long ones take fewer calls. Few
# lengths, for the first block of each is slow: on a CPU, planning its convolutions takes twice as
# long as decoding it.
BLOCK_LENGTHS = 6, 12, 24, 48
_REPEATS_CPU = 4  # blocks of each length; while one plays, the next, twice as long, is decoded
_REPEATS_CUDA = 1  # decoding is much faster there

SILENCE = 10 ** (-50 / 20)  # amplitude, -50 dBFS
_MARGIN_SECONDS = 0.05  # seconds that stay before the first and after the last sound


def decode_stream(
    codec: Codec, frames: Iterable[Tensor], repeats: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """Decode frames [K] in blocks: yields waveforms [1, n] on the CPU with their number of frames.

    The codec is causal and a `ConvState` holds what a block depends on: every block equals the same
    stretch of the whole. The same frames always give the same blocks, however fast they come. There
    are `repeats` blocks of each of the `BLOCK_LENGTHS` before the next (None: as suits the device).
    Raises `ValueError` where damaged weights give no numbers.
    """
    if repeats is None:
        repeats = _REPEATS_CUDA if codec.device.type == "cuda" else _REPEATS_CPU
    state: ConvState = {}
    frames = iter(frames)
    for number in itertools.count():
        length = BLOCK_LENGTHS[min(number // repeats, len(BLOCK_LENGTHS) - 1)]
        block = list(itertools.islice(frames, length))
        if block:
            yield _decode(codec, block, state), len(block)
        if len(block) < length:
            return


def _decode(codec: Codec, frames: list[Tensor], state: ConvState) -> Tensor:
    """Waveform [1, n] of the next frames [K], float32 on the CPU.

    They are padded to the next block length: the codec is causal, so it changes nothing in them.
    """
    length = min(length for length in BLOCK_LENGTHS if length >= len(frames))
    codes = torch.stack(frames + frames[-1:] * (length - len(frames)), dim=1)
    waveforms, _ = codec.decode(codes[None].to(codec.device), state=state)
    waveform = waveforms[0, :, : len(frames) * codec.frame_length].float().cpu()
    if not waveform.isfinite().all():
        raise ValueError(DAMAGED)
    return waveform


class SilenceTrimmer:
    """Trims the silence at both ends of a stream of waveforms [1, n].

    Silence is held back until sound follows it; what is held at the end of the stream is dropped.
    """

    def __init__(self, sample_rate: int) -> None:
        self._margin = round(_MARGIN_SECONDS * sample_rate)
        self._held, self._started = torch.zeros(1, 0), False
        self._margin_left = 0  # samples of the margin after the last sound that are still to come

    def __call__(self, waveform: Tensor) -> Tensor:
        held = torch.cat([self._held, waveform], dim=1)
        loud = (held[0].abs() > SILENCE).nonzero()
        start = end = 0
        if len(loud):
            start = 0 if self._started else max(0, loud[0].item() - self._margin)
            end = loud[-1].item() + 1
            self._started, self._margin_left = True, self._margin
        elif not self._started:
            self._held = held[:, -self._margin :]
            return held[:, :0]
        margin = min(self._margin_left, held.shape[1] - end)
        self._margin_left -= margin
        self._held = held[:, end + margin :]
        return held[:, start : end + margin]
