"""Real clips as the codec gives them back: more than that no model that speaks by it can reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from fish_speech.audio import load_audio, save_audio
from fish_speech.devices import resolve_device
from fish_speech.evaluation.synthesis import Recording
from fish_speech.files import file_digest
from fish_speech.inference.streaming import decode_stream
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.models.vqgan.codec import find_codec

FOLDER = "codec"
_MOST = 32  # clips


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
        """By voice, `_MOST` in all, without the clips that can't be read."""
        share = max(1, _MOST // max(1, len(recordings)))
        chosen = [(voice, clip) for voice, clips in recordings.items() for clip in clips[:share]]
        made: dict[str, list[Recording]] = {}
        for voice, clip in tqdm(chosen[:_MOST], desc="codec", unit="clip", disable=None):
            if (again := self._made(clip)) is not None:
                made.setdefault(voice, []).append(again)
        return made

    def _made(self, clip: Recording) -> Recording | None:
        try:
            audio = self._folder / f"{file_digest(clip.audio)[:16]}.wav"
            waveform = None if audio.is_file() else self._there_and_back(clip.audio)
        except (OSError, ValueError):  # whoever uses the clip or the model says so
            return None
        if waveform is not None:
            save_audio(audio, waveform, self._codec.sample_rate)
        return Recording(audio, clip.text)

    def _there_and_back(self, audio: Path) -> torch.Tensor:
        """What is heard of a file behind the codec: [1, N]."""
        waveform, _ = load_audio(audio, self._codec.sample_rate)
        codes, _ = self._codec.encode(waveform[None].to(self._codec.device))
        blocks = [block for block, _ in decode_stream(self._codec, codes[0].unbind(1))]
        return torch.cat(blocks, dim=1) if blocks else waveform[:, :0]
