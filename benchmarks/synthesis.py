"""Rows `synthesis_*`: text to sound, as `cli_tts.py` makes it (on a CPU with int8)."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks.codec import SECONDS, decode_limit
from benchmarks.generate import fastest_precision, frames_limit
from benchmarks.measure import BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model_with_codec

if TYPE_CHECKING:
    from fish_speech.inference import Settings, TextToSpeech

_FRAMES = 108  # five seconds
_TEXT = "The ferry leaves at ten past four, and whoever is late waits for the morning."


def synthesis_int8_row(device: str) -> BenchmarkRow:
    seconds, peak = in_new_process(_speak, full_size_model_with_codec(), device)
    return _row(f"synthesis_{fastest_precision(device)}", device, seconds, peak, "a sentence")


def synthesis_first_row(device: str) -> BenchmarkRow:
    """What somebody who starts the program waits for, once it is loaded."""
    directory = full_size_model_with_codec()
    seed, _ = in_new_process(_find_seed, directory, device)
    seconds, peak = in_new_process(_speak, directory, device, seed)
    return _row("synthesis_first", device, seconds, peak, "the first sentence of a process")


def _row(
    name: str, device: str, spoken: tuple[float, float], peak: float, what: str
) -> BenchmarkRow:
    (seconds, audio_seconds), precision = spoken, fastest_precision(device)
    directory = full_size_model_with_codec()
    (frames, _), _ = in_new_process(frames_limit, directory, precision, device)
    decoder_dtype = "bfloat16" if precision == "int8" else "float32"
    (decoding, *_), _ = in_new_process(decode_limit, directory, decoder_dtype, device)
    return BenchmarkRow(
        name=name,
        figure=seconds / audio_seconds,
        unit="s/s",
        limit=_FRAMES / audio_seconds / frames + decoding / SECONDS,
        peak_memory_gb=peak,
        workload=f"{what} of {audio_seconds:.1f} s with its prompt: seconds for one of speech; "
        f"limit: those of generation in {precision} and of decoding in "
        f"{decoder_dtype}, one after the other",
    )


def _speak(directory: Path, device: str, seed: int | None = None) -> tuple[float, float]:
    """Seconds that a sentence takes, and its length in seconds. Given a `seed`, it is the first
    sentence of the process; else others come before, to find a seed."""
    tts = _load(directory, device)
    if seed is None:
        seed = _find_seed(directory, device, tts)
    start = perf_counter()
    pieces = list(tts.pieces(_TEXT, settings=_settings(seed)))
    elapsed = perf_counter() - start
    return elapsed, sum(piece.waveform.shape[1] for piece in pieces) / tts.sample_rate


def _find_seed(directory: Path, device: str, tts: TextToSpeech | None = None) -> int:
    """A seed with which the random weights speak exactly `_FRAMES` frames."""
    tts = tts or _load(directory, device)
    for seed in range(1, 100):
        if sum(p.frames for p in tts.pieces(_TEXT, settings=_settings(seed))) == _FRAMES:
            return seed
    raise ValueError(f"{directory}: no seed makes {_FRAMES} frames")


def _load(directory: Path, device: str) -> TextToSpeech:
    from fish_speech.inference import TextToSpeech
    from fish_speech.resources import tune_malloc

    quantize = "int8" if fastest_precision(device) == "int8" else None
    tts = TextToSpeech.from_pretrained(directory, device=device, quantize=quantize)
    tune_malloc()  # as cli_tts.py does
    return tts


def _settings(seed: int) -> Settings:
    from fish_speech.inference import Settings

    return Settings(seed=seed, max_new_tokens=_FRAMES, retries=0)
