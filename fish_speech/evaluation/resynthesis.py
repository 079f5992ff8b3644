"""Real clips through the codec and back: the upper bound of every model that uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from fish_speech.audio import is_whole, load_audio, save_audio
from fish_speech.devices import resolve_device
from fish_speech.evaluation.synthesis import RealClip
from fish_speech.files import file_digest
from fish_speech.inference.streaming import decode_stream
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.models.vqgan.codec import find_codec

_CODEC_FOLDER = "codec"
_MAX_CLIPS = 32


class Resynthesis:
    """Clips encoded and decoded by the codec of a model directory, each made once, in `folder`.

    The codec is loaded where there is something to make; where it can't be, nothing is made.
    """

    def __init__(self, model_dir: Path, folder: Path, device: str = "auto") -> None:
        self._model_dir, self._device = model_dir, device
        self._folder = folder / _CODEC_FOLDER / file_digest(find_codec(model_dir))[:16]

    @cached_property
    def _codec(self) -> Codec:
        return load_codec(self._model_dir, resolve_device(self._device))

    def of(self, real_clips: Mapping[str, Sequence[RealClip]]) -> dict[str, list[RealClip]]:
        """By voice, `_MAX_CLIPS` in all, without the clips that can't be read."""
        each = max(1, _MAX_CLIPS // max(1, len(real_clips)))
        chosen = [(voice, clip) for voice, clips in real_clips.items() for clip in clips[:each]]
        made: dict[str, list[RealClip]] = {}
        for voice, clip in tqdm(chosen[:_MAX_CLIPS], desc="codec", unit="clip", disable=None):
            if (copy := self._resynthesise(clip)) is not None:
                made.setdefault(voice, []).append(copy)
        return made

    def _resynthesise(self, clip: RealClip) -> RealClip | None:
        try:
            audio = self._folder / f"{file_digest(clip.audio)[:16]}.wav"
            waveform = None if is_whole(audio) else self._roundtrip(clip.audio)
        except (OSError, ValueError):  # whoever uses the clip or the model says so
            return None
        if waveform is not None:
            save_audio(audio, waveform, self._codec.sample_rate)
        return RealClip(audio, clip.text)

    def _roundtrip(self, audio: Path) -> torch.Tensor:
        """A file encoded and decoded: waveform [1, N]."""
        waveform, _ = load_audio(audio, self._codec.sample_rate)
        # Untrimmed, unlike `encode_batch`: the last, partial frame is decoded too.
        codes, _ = self._codec.encode(waveform[None].to(self._codec.device))
        blocks = [block for block, _ in decode_stream(self._codec, codes[0].unbind(1))]
        return torch.cat(blocks, dim=1) if blocks else waveform[:, :0]
