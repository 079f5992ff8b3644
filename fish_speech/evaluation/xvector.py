"""Larger speaker encoders, from the hub or a folder, by transformers (the extra `speaker`)."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fish_speech.devices import resolve_device
from fish_speech.evaluation.speaker import SAMPLE_RATE, SILENCE_RMS, SpeakerEncoder, rms

SUGGESTED = "microsoft/wavlm-base-plus-sv"
_MIN_SAMPLES = SAMPLE_RATE  # fewer leave no frame for the last layers
_MAX_SAMPLES = 30 * SAMPLE_RATE  # attention's memory grows with the square
_TRAINING_HEADS = ("classifier.", "objective.")  # behind the embedding


class Encoder(Protocol):
    """Turns speech into a speaker embedding; those of one encoder are comparable."""

    identity: str

    def embed(self, samples: np.ndarray) -> np.ndarray | None:
        """The speaker embedding of speech [N] (float32, 16 kHz): a unit vector [D]; None for
        silence."""


def load_encoder(name: str | None = None, device: str = "auto") -> Encoder:
    """The speaker encoder that comes with the repository, or the x-vector model `name`: an id on
    the hub or a folder. Raises `ValueError` with the remedy where it can't be had."""
    return XVector(name, device) if name else SpeakerEncoder.from_pretrained()


class XVector:
    """A model with an x-vector head (WavLM, UniSpeech-SAT, wav2vec 2), such as `SUGGESTED`.

    The hub's own settings hold (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME).
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        if find_spec("transformers") is None:
            raise ValueError(
                f"--speaker-encoder {name}: install what loads it with 'pip install transformers'"
            )
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioXVector
        from transformers.utils import logging

        logging.set_verbosity_error()
        getLogger("huggingface_hub").setLevel(ERROR)  # it warns of every try; the last one is said
        logging.disable_progress_bar()  # of the weights being copied; downloads have their own
        try:
            AutoConfig.from_pretrained(name)  # whose errors say what is wrong
            self._features = AutoFeatureExtractor.from_pretrained(name)
            model, report = AutoModelForAudioXVector.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"--speaker-encoder {name}: {reason}; give an x-vector model, by its id on the hub "
                f"(downloaded once) or its folder, such as {SUGGESTED}, or leave the option out: "
                "a smaller encoder comes with this repository"
            ) from error
        missing = [key for key in report["missing_keys"] if not key.startswith(_TRAINING_HEADS)]
        if missing:
            raise ValueError(
                f"--speaker-encoder {name}: its weights lack {min(missing)} and {len(missing) - 1} "
                f"more, so its vectors would be random; use a model for speakers, as {SUGGESTED}"
            )
        if self._features.sampling_rate != SAMPLE_RATE:
            raise ValueError(
                f"--speaker-encoder {name}: it listens at {self._features.sampling_rate} Hz; use "
                f"one for {SAMPLE_RATE} Hz, as {SUGGESTED}"
            )
        self._model = model.to(resolve_device(device)).eval()
        self.identity = _identity(name)

    @torch.no_grad()
    def embed(self, samples: np.ndarray) -> np.ndarray | None:
        """The speaker embedding of speech [N] (float32, 16 kHz): a unit vector [D]; None for
        silence. Only the first half minute counts.
        """
        if not rms(samples) > SILENCE_RMS:
            return None
        samples = np.pad(samples[:_MAX_SAMPLES], (0, max(0, _MIN_SAMPLES - len(samples))))
        inputs = self._features(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of how transformers calls it
            embedding = self._model(**inputs.to(self._model.device)).embeddings[0].float()
        return torch.nn.functional.normalize(embedding, dim=0).cpu().numpy()


def _identity(name: str) -> str:
    """The folder's name, or the id on the hub and the commit that it was downloaded at."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name).resolve().name
    config = try_to_load_from_cache(name, "config.json")  # snapshots/COMMIT/config.json
    return f"{name}, commit {Path(config).parent.name[:8]}" if isinstance(config, str) else name
