"""Waveforms piece by piece: decode frames while they come, cut silence at both ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fish_speech.models.vqgan import Codec
from fish_speech.models.vqgan.firefly import ConvState

# Frames of a block: the first is heard soon, the later ones take fewer calls. Few lengths, for
# every one that is new to a process is planned by what computes it: on a CPU that takes as long as
# decoding it twice.
BLOCKS = 6, 12, 24, 48
_TIMES = 4  # of each length: while a block plays, the next, twice as long, has to be made
_TIMES_ON_A_CARD = 1  # which makes them much sooner

SILENCE = 10 ** (-50 / 20)  # amplitude, -50 dBFS
_MARGIN = 0.05  # seconds that stay before the first and after the last sound


def decode_stream(
    codec: Codec, frames: Iterable[Tensor], times: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """Decode frames [K] in blocks: yields waveforms [1, n] on the CPU with their number of frames.

    The codec is causal and remembers what a block depends on: every block equals the same stretch
    of the whole. Blocks do not depend on time, so that the same frames always give the same blocks.
    Each length of `BLOCKS` is decoded `times` times before the next (None: as suits the device).
    """
    if times is None:
        times = _TIMES_ON_A_CARD if codec.device.type == "cuda" else _TIMES
    state: ConvState = {}
    frames = iter(frames)
    for number in itertools.count():
        length = BLOCKS[min(number // times, len(BLOCKS) - 1)]
        block = list(itertools.islice(frames, length))
        if block:
            yield _decode(codec, block, state), len(block)
        if len(block) < length:
            return


def _decode(codec: Codec, frames: list[Tensor], state: ConvState) -> Tensor:
    """Waveform [1, n] of the frames [K] that come next, float32 on the CPU; decoded as the shortest
    block that holds them, for what follows changes nothing in them."""
    length = min(length for length in BLOCKS if length >= len(frames))
    codes = torch.stack(frames + frames[-1:] * (length - len(frames)), dim=1)
    waveforms, _ = codec.decode(codes[None].to(codec.device), state=state)
    return waveforms[0, :, : len(frames) * codec.frame_length].float().cpu()


class SilenceTrimmer:
    """Takes the silence off both ends of a stream, given one waveform [1, n] after the other.

    Silence is held back until sound follows it; what is held at the end of the stream is dropped.
    """

    def __init__(self, sample_rate: int) -> None:
        self._margin = round(_MARGIN * sample_rate)
        self._held, self._started = torch.zeros(1, 0), False
        self._owed = 0  # samples of the margin behind the last sound that are still to come

    def __call__(self, waveform: Tensor) -> Tensor:
        held = torch.cat([self._held, waveform], dim=1)
        loud = (held[0].abs() > SILENCE).nonzero()
        start = end = 0
        if len(loud):
            start = 0 if self._started else max(0, loud[0].item() - self._margin)
            end = loud[-1].item() + 1
            self._started, self._owed = True, self._margin
        elif not self._started:
            self._held = held[:, -self._margin :]
            return held[:, :0]
        margin = min(self._owed, held.shape[1] - end)
        self._owed -= margin
        self._held = held[:, end + margin :]
        return held[:, start : end + margin]
