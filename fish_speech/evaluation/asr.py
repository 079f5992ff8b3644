"""Which recogniser listens: whisper where its model is at hand, else pocketsphinx for English."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from fish_speech.preparation.error_rates import normal_words
from fish_speech.preparation.transcribe import (
    SAMPLE_RATE,
    Recogniser,
    Transcription,
    load_recogniser,
    whisper_cache,
)

DEFAULT_WHISPER = "base"
# A seventh of English and next to nothing of its neighbours is made of these.
_ENGLISH = set(
    "the and to that it with you he his not are they this from she but my which were".split()  # noqa: SIM905
)
_ENOUGH_WORDS = 30  # to judge a language by


class PocketSphinx:
    """pocketsphinx with the US English model in its wheel: fast, offline, and inaccurate."""

    def __init__(self) -> None:
        from pocketsphinx import Config, Decoder

        self._decoder = Decoder(Config(samprate=SAMPLE_RATE, loglevel="FATAL"))
        self.identity = f"pocketsphinx {version('pocketsphinx')} (en-US)"

    def transcribe(self, samples: np.ndarray) -> Transcription:
        """What is said in samples [N]; earlier clips have no influence."""
        if not len(samples):
            return Transcription("")
        pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
        self._decoder.reinit_feat()  # forgets the running means of earlier clips
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return Transcription(found.hypstr if found else "")

    def understands(self, texts: Sequence[str]) -> bool:
        """Whether the texts are English, by its dictionary and by the commonest English words."""
        words = normal_words(" ".join(texts)).split()
        words = [word for word in words if not word.isdigit()]
        if not words:
            return False
        known = sum(self._decoder.lookup_word(word) is not None for word in words)
        common = sum(word in _ENGLISH for word in words)
        return known > 0.6 * len(words) and (
            len(words) < _ENOUGH_WORDS or common > 0.05 * len(words)
        )


def choose_recogniser(
    texts: Sequence[str], whisper_model: str | None = None, device: str = "auto"
) -> tuple[Recogniser | None, str | None]:
    """The best recogniser at hand for these texts, and what the user should know of the choice.

    A `whisper_model` that is asked for is loaded, and downloaded where it must be (raises
    `ValueError` where it can't be had). Otherwise nothing is downloaded.
    """
    if whisper_model or is_available_offline(DEFAULT_WHISPER):
        return load_recogniser(whisper_model or DEFAULT_WHISPER, device=device), None
    advice = "--whisper-model base hears many languages (it is downloaded once)"
    if find_spec("pocketsphinx") is None:
        return None, f"no recogniser is installed, so there are no error rates; {advice}"
    sphinx = PocketSphinx()
    if not sphinx.understands(texts):
        return None, f"the texts are not English, the only language of pocketsphinx; {advice}"
    return sphinx, None


def is_available_offline(model: str) -> bool:
    """Whether `load_recogniser` would find a whisper model without a network."""
    if find_spec("faster_whisper"):
        from faster_whisper.utils import download_model

        try:
            download_model(model, local_files_only=True)
        except Exception:  # the hub's own kinds of not finding it
            return False
        return True
    return (whisper_cache() / f"{model}.pt").is_file()
