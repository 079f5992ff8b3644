"""Real clips as the codec gives them back: more than that no model that speaks by it can reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from fish_speech.audio import load_audio, save_audio
from fish_speech.devices import resolve_device
from fish_speech.evaluation.takes import Recording
from fish_speech.files import file_digest
from fish_speech.inference.streaming import decode_stream
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.models.vqgan.codec import find_codec

FOLDER = "codec"


class Resynthesis:
    """Clips encoded and decoded by the codec of a model directory, each made once, in `folder`.

    The codec is loaded where there is something to make; where it can't be, nothing is made.
    """

    def __init__(self, model_dir: Path, folder: Path, device: str = "auto") -> None:
        self._model_dir, self._device = model_dir, device
        self._folder = folder / FOLDER / file_digest(find_codec(model_dir))[:16]

    @cached_property
    def _codec(self) -> Codec:
        return load_codec(self._model_dir, resolve_device(self._device))

    def of(self, recordings: Mapping[str, Sequence[Recording]]) -> dict[str, list[Recording]]:
        """By voice, without the clips that can't be read."""
        return {voice: list(self._made(clips)) for voice, clips in recordings.items()}

    def _made(self, clips: Sequence[Recording]) -> Iterator[Recording]:
        for clip in clips:
            with suppress(OSError, ValueError):  # whoever uses the clip or the model says so
                audio = self._folder / f"{file_digest(clip.audio)[:16]}.wav"
                if not audio.is_file():
                    save_audio(audio, self._there_and_back(clip.audio), self._codec.sample_rate)
                yield Recording(audio, clip.text)

    def _there_and_back(self, audio: Path) -> torch.Tensor:
        """What is heard of a file behind the codec: [1, N]."""
        waveform, _ = load_audio(audio, self._codec.sample_rate)
        codes, _ = self._codec.encode(waveform[None].to(self._codec.device))
        blocks = [block for block, _ in decode_stream(self._codec, codes[0].unbind(1))]
        return torch.cat(blocks, dim=1) if blocks else waveform[:, :0]
