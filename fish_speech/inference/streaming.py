"""Waveforms piece by piece: decode frames while they come, cut silence at both ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fish_speech.models.vqgan import Codec
from fish_speech.models.vqgan.firefly import Memory

# Frames of the first block and of the longest: the first is heard soon, the later ones take fewer
# calls.
FIRST_BLOCK, LONGEST_BLOCK = 6, 48
_GROWTH = 1.2  # no faster: while a block plays, the next has to be made

SILENCE = 10 ** (-50 / 20)  # amplitude, -50 dBFS
_MARGIN = 0.05  # seconds that stay before the first and after the last sound


def decode_stream(codec: Codec, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Decode frames [K] in blocks: yields waveforms [1, n] on the CPU with their number of frames.

    The codec is causal and remembers what a block depends on: every block equals the same stretch
    of the whole. Blocks do not depend on time, so that the same frames always give the same blocks.
    """
    memory: Memory = {}
    block: list[Tensor] = []
    size = float(FIRST_BLOCK)
    for frame in frames:
        block.append(frame)
        if len(block) >= int(size):
            yield _decode(codec, block, memory), len(block)
            block, size = [], min(size * _GROWTH, LONGEST_BLOCK)
    if block:
        yield _decode(codec, block, memory), len(block)


def _decode(codec: Codec, frames: list[Tensor], memory: Memory) -> Tensor:
    """Waveform [1, n] of the frames [K] that come next, float32 on the CPU."""
    codes = torch.stack(frames, dim=1)[None].to(codec.device)
    waveforms, _ = codec.decode(codes, memory=memory)
    return waveforms[0].float().cpu()


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
