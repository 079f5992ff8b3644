"""Reference recordings as utterances, which a voice is cloned from."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from fish_speech.audio import load_audio
from fish_speech.conversation import Utterance
from fish_speech.files import file_digest
from fish_speech.inference.references import check_reference
from fish_speech.inference.streaming import SILENCE
from fish_speech.models.text2semantic import ModelConfig
from fish_speech.models.vqgan import Codec
from fish_speech.text import max_speech_seconds, min_speech_seconds, spoken_text

logger = logging.getLogger(__name__)

_CACHE_SIZE = 16  # recordings


class ReferenceEncoder:
    """Encodes recordings as utterances for a model with this config.

    The last few are cached by their content. Safe to use from several threads.
    """

    def __init__(self, codec: Codec, config: ModelConfig) -> None:
        self._codec, self._config = codec, config
        self._cache: OrderedDict[str, Utterance] = OrderedDict()  # by the file's digest
        self._lock = threading.Lock()

    def encode(self, audio: str | Path, text: str) -> Utterance:
        """See `TextToSpeech.encode_reference`."""
        check_reference(audio, text)
        digest, text = file_digest(audio), spoken_text(text)
        with self._lock:
            cached = self._cache.get(digest)
            if cached is None or cached.text != text:
                codes = self._encode(audio) if cached is None else cached.codes
                if problem := self._mismatch(text, codes.shape[1]):
                    logger.warning(f"{audio}: {problem}; it may be cloned badly")
                cached = self._cache[digest] = Utterance(text, codes)
            self._cache.move_to_end(digest)
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
            return cached

    def _mismatch(self, text: str, frames: int) -> str | None:
        """Why a reference of so many frames suits its text or model badly; None if it suits."""
        seconds = frames / self._codec.frame_rate
        if not min_speech_seconds(text) <= seconds <= max_speech_seconds(text):
            return f"{seconds:.1f} s for {text[:40]!r}: is that all it says?"
        trained = self._config.extra.get("trained_seq_len", 2 * frames)
        if 2 * frames > trained:  # it would leave less than half for the speech
            longest = trained / 2 / self._codec.frame_rate
            return (
                f"{seconds:.1f} s, and this model was trained on short texts: take {longest:.0f} s"
            )
        return None

    @torch.inference_mode()
    def _encode(self, audio: str | Path) -> Tensor:
        """Codes [K, T] of a recording, on the CPU."""
        longest = self._config.max_seq_len / self._codec.frame_rate  # seconds
        waveform, rate = load_audio(audio, self._codec.sample_rate, max_seconds=longest + 1)
        if waveform.shape[1] > longest * rate:
            raise ValueError(
                f"{audio}: longer than the {longest:.0f} s that the model can remember at all;"
                " cut a reference of 5 to 30 s"
            )
        if not (waveform.abs() > SILENCE).any():
            raise ValueError(f"{audio}: silent; give some seconds of speech")
        (codes,) = self._codec.encode_batch([waveform])
        if not codes.shape[1]:
            raise ValueError(f"{audio}: too short for a reference; give some seconds of speech")
        return codes
