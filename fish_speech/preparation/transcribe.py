"""Speech recognition: what is said in a clip, and when; with guards against hallucinations.

openai-whisper is the default; faster-whisper is used where it is installed. Both are given arrays,
so no ffmpeg program is needed. Transcriptions are kept in a file: a killed run loses none.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fish_speech.devices import resolve_device
from fish_speech.files import errors_naming, file_digest
from fish_speech.preparation.align import Word
from fish_speech.preparation.error_rates import normal
from fish_speech.preparation.options import WHISPER_BACKENDS
from fish_speech.preparation.segment import Region
from fish_speech.preparation.sources import first_line
from fish_speech.resources import is_out_of_memory

SAMPLE_RATE = 16_000  # Hz; what recognisers are given
_WINDOW = 30 * SAMPLE_RATE  # of whisper
_LANGUAGE_WINDOWS = 4  # from which a language is detected


@dataclass(frozen=True)
class Transcription:
    """What a recogniser made of a clip: the text, its words with times in seconds of the clip, and
    the probability (0..1) that nobody speaks."""

    text: str
    words: tuple[Word, ...] = ()
    no_speech: float = 0.0


class Recogniser(Protocol):
    """Turns samples [N] (float32, 16 kHz) into a `Transcription`; `identity` names the model."""

    identity: str

    def transcribe(self, samples: np.ndarray) -> Transcription: ...


def load_recogniser(
    model: str, *, backend: str = "auto", language: str | None = None, device: str = "auto"
) -> Recogniser:
    """Load a whisper model once: a published name, or a path to a checkpoint.

    Raises `ValueError` with the remedy where the model or the backend can't be had.
    """
    if backend == "auto":
        backend = (
            "faster" if find_spec("faster_whisper") and not model.endswith(".pt") else "openai"
        )
    device = str(resolve_device(device))
    make = {"openai": OpenAIWhisper, "faster": FasterWhisper}.get(backend)
    if make is None:
        raise ValueError(f"--whisper-backend {backend}: use one of {' '.join(WHISPER_BACKENDS)}")
    return make(model, language, device)


class _Whisper:
    """A whisper model, named `name`, for speech in `language`; None: it detects that itself."""

    def __init__(self, backend: str, model: str, language: str | None) -> None:
        if Path(model).is_file():
            model = file_digest(model)[:16]
        self.name, self.language = f"{backend} {model}", language

    @property
    def identity(self) -> str:
        return f"{self.name} {self.language or ''}"

    def with_language(self, language: str) -> _Whisper:
        """The same model, for speech in this language."""
        other = copy(self)
        other.language = language
        return other

    def detect_language(self, samples: np.ndarray) -> str | None:
        """The most likely language of samples [N], of which the first two minutes are enough.

        None where the model knows only one.
        """
        totals = Counter()
        for start in range(0, min(len(samples), _LANGUAGE_WINDOWS * _WINDOW), _WINDOW):
            window = samples[start : start + _WINDOW]
            for language, probability in self._language_probabilities(window).items():
                totals[language] += len(window) * probability
        return max(totals, key=totals.get, default=None)

    def _language_probabilities(self, window: np.ndarray) -> dict[str, float]:
        """Of each language, in at most 30 s; of none where the model knows only one."""
        raise NotImplementedError


class NoModelError(ValueError):
    """A model is not on this machine and can't be downloaded; the text says where to put it."""


class OpenAIWhisper(_Whisper):
    """openai-whisper."""

    def __init__(self, model: str, language: str | None, device: str) -> None:
        import whisper

        names = whisper.available_models()
        if model not in names and not Path(model).is_file():
            raise ValueError(f"--whisper-model {model}: no such file, nor one of {' '.join(names)}")
        if device == "mps":
            device = "cpu"  # its sparse alignment heads have no MPS kernel
        try:
            self.model = whisper.load_model(model, device=device)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad checksum is not
            if is_out_of_memory(error):
                raise ValueError(
                    f"--whisper-model {model}: out of memory on {device}; use a smaller one, or "
                    "--device cpu"
                ) from error
            raise NoModelError(_unavailable(model, error)) from error
        except Exception as error:  # whatever unpickling or a foreign checkpoint raises
            # Their messages have many lines and advise to load what may be anything.
            raise ValueError(
                f"--whisper-model {model}: not a whisper checkpoint, or damaged; download it again"
            ) from error
        if language is not None and language.lower() not in _known_languages():
            raise ValueError(f"--language {language}: not a language of whisper; en, de, ... are")
        self.fp16 = device.startswith("cuda")
        super().__init__("openai", model, language)

    def transcribe(self, samples: np.ndarray) -> Transcription:
        result = self.model.transcribe(
            samples,
            language=self.language,
            fp16=self.fp16,
            word_timestamps=True,
            condition_on_previous_text=False,
            verbose=None,
        )
        return _transcription(
            result["text"],
            [part["no_speech_prob"] for part in result["segments"]],
            [
                Word(word["word"].strip(), float(word["start"]), float(word["end"]))
                for part in result["segments"]
                for word in part.get("words", ())
            ],
        )

    def _language_probabilities(self, window: np.ndarray) -> dict[str, float]:
        import whisper

        if not self.model.is_multilingual:
            return {}
        window = whisper.pad_or_trim(window)
        mel = whisper.log_mel_spectrogram(window, self.model.dims.n_mels, device=self.model.device)
        return self.model.detect_language(mel)[1]


class FasterWhisper(_Whisper):
    """faster-whisper, the same models on CTranslate2 (the extra `fast`)."""

    def __init__(self, model: str, language: str | None, device: str) -> None:
        if find_spec("faster_whisper") is None:
            raise ValueError(
                "--whisper-backend faster: install it with 'pip install faster-whisper'"
            )
        from faster_whisper import WhisperModel

        device, _, index = device.partition(":")
        device = device if device == "cuda" else "cpu"
        kind = "float16" if device == "cuda" else "int8"
        try:
            self.model = WhisperModel(
                model, device=device, device_index=int(index or 0), compute_type=kind
            )
        except Exception as error:  # its download and its loader raise what they like
            raise ValueError(
                f"--whisper-model {model}: faster-whisper can't load it ({first_line(error)}); "
                "get it where there is a network, give its folder as --whisper-model, or put "
                "transcripts (.txt) beside the recordings"
            ) from error
        super().__init__("faster", model, language)

    def transcribe(self, samples: np.ndarray) -> Transcription:
        parts, _ = self.model.transcribe(
            samples,
            language=self.language,
            word_timestamps=True,
            condition_on_previous_text=False,
        )
        parts = list(parts)
        return _transcription(
            "".join(part.text for part in parts),
            [part.no_speech_prob for part in parts],
            [
                Word(word.word.strip(), float(word.start), float(word.end))
                for part in parts
                for word in part.words or ()
            ],
        )

    def _language_probabilities(self, window: np.ndarray) -> dict[str, float]:
        _, info = self.model.transcribe(window)  # nothing is decoded before its parts are asked for
        return dict(info.all_language_probs or ())


def hallucination_reason(transcription: Transcription, seconds: float) -> str | None:
    """Why this can't be what was said in `seconds` of speech; None where it can."""
    letters = len(normal(transcription.text))
    if not letters:
        return "no words were recognised"
    if has_repetition_loop(transcription.text):
        return "the recogniser repeated itself"
    rate = letters / max(seconds, 0.1)
    if not 1.0 <= rate <= 35.0:
        return f"the recognised text has {rate:.1f} letters a second"
    return None


def longest_untranscribed(
    transcription: Transcription, regions: list[Region], seconds: float
) -> float:
    """The most seconds of speech (`regions`, in a clip of `seconds`) without a recognised word.

    At a stretch: before, between or after the words. 0 where their times aren't known.
    """
    if not transcription.words:
        return 0.0
    spans = (time for word in transcription.words for time in (word.start, word.end))
    times = [0.0, *spans, seconds]
    return max(
        sum(max(0.0, min(end, after) - max(start, before)) for start, end in regions)
        for before, after in zip(times[::2], times[1::2], strict=True)
    )


def has_repetition_loop(text: str) -> bool:
    """Whether a phrase comes four times in a row (a word six times), or as good as that."""
    words = text.casefold().split()
    for size in range(1, len(words) // 4 + 1):
        run = 0
        for index in range(size, len(words)):
            run = run + 1 if words[index] == words[index - size] else 0
            if run >= max(3 * size, 5):
                return True
    # What compresses too well. A byte a character, in windows of one length: else the limit would
    # depend on the script and on the length of the text.
    data = bytes(ord(character) % 256 for character in text)
    windows = [data[begin : begin + 300] for begin in range(0, max(1, len(data) - 150), 150)]
    return any(len(part) > 60 and len(part) / len(zlib.compress(part)) > 2.4 for part in windows)


class CachedRecogniser:
    """A recogniser that transcribes nothing twice, neither in this run nor in later ones.

    One line of JSON for each clip, and for each recording's language, is appended to `path`; the
    key is a digest of the samples and of the recogniser's identity, which includes the language. A
    last line that was being written when a run died is cut off.
    """

    def __init__(self, recogniser: Recogniser, path: Path) -> None:
        self.recogniser, self.path = recogniser, path
        self._entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with path.open("rb+") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    self._entries[entry.pop("key")] = entry
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # what a crash left unreadable is transcribed again

    @property
    def identity(self) -> str:
        return self.recogniser.identity

    @property
    def language(self) -> str | None:
        """The language of its recogniser, where that is known."""
        return getattr(self.recogniser, "language", None)

    def with_language_of(self, clips: Iterable[np.ndarray]) -> CachedRecogniser:
        """Itself, with one language for all of a recording: that of its first clips [N].

        (A short clip on its own may be taken for another language.)
        """
        detect = getattr(self.recogniser, "detect_language", None)
        if detect is None or self.language is not None:
            return self
        samples = np.concatenate(list(clips))
        language = self._cached(
            "language", samples, lambda: {"language": detect(samples)}, _read_language
        )
        if language is None:
            return self
        other = copy(self)
        other.recogniser = self.recogniser.with_language(language)
        return other

    def transcribe(self, samples: np.ndarray) -> Transcription:
        return self._cached(
            "", samples, lambda: asdict(self.recogniser.transcribe(samples)), _read_transcription
        )

    def _cached(
        self,
        what: str,
        samples: np.ndarray,
        compute: Callable[[], dict[str, Any]],
        read: Callable[[dict[str, Any]], Any],
    ) -> Any:
        """What `compute` returns for `samples`, computed once, as `read` gives it.

        It is computed again where `read` raises an error for what a damaged file holds.
        """
        digest = hashlib.sha256((self.identity + what).encode())
        digest.update(np.ascontiguousarray(samples, np.float32).tobytes())
        key = digest.hexdigest()[:24]
        with suppress(KeyError, TypeError, ValueError):
            return read(self._entries[key])
        entry = self._entries[key] = compute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with errors_naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n")
        return read(entry)


def _read_language(entry: dict[str, Any]) -> str | None:
    if not isinstance(entry["language"], str | None):
        raise TypeError("not a language")
    return entry["language"]


def _read_transcription(entry: dict[str, Any]) -> Transcription:
    if not isinstance(entry["text"], str):
        raise TypeError("not a text")
    words = tuple(
        Word(word["text"], float(word["start"]), float(word["end"])) for word in entry["words"]
    )
    return Transcription(entry["text"], words, float(entry.get("no_speech", 0.0)))


def _transcription(text: str, no_speech: list[float], words: list[Word]) -> Transcription:
    """A transcription of several parts; without any, it is certain that nobody speaks."""
    worst = max(map(float, no_speech), default=1.0)
    return Transcription(" ".join(text.split()), tuple(words), round(worst, 4))


def _known_languages() -> set[str]:
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    return {*LANGUAGES, *TO_LANGUAGE_CODE}


def whisper_cache() -> Path:
    """Where openai-whisper keeps the models that it has downloaded."""
    return Path(os.getenv("XDG_CACHE_HOME", Path.home() / ".cache"), "whisper")


def _unavailable(model: str, error: Exception) -> str:
    import whisper

    address = whisper._MODELS.get(model)
    if address is None:
        return f"--whisper-model {model}: can't be loaded ({first_line(error)})"
    return (
        f"whisper model '{model}' can't be downloaded ({first_line(error)}): download {address} "
        f"where there is a network and put it into {whisper_cache()}, or give a checkpoint's path "
        "as --whisper-model"
    )
