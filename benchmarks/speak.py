"""Row `synthesis_int8`: text to sound, as `cli_tts.py` makes it (on a CPU with int8)."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from benchmarks.codec import SECONDS, decode_limit
from benchmarks.full_size import full_size_voice
from benchmarks.generate import fastest_kind, frames_limit
from benchmarks.measure import Row, fresh

_FRAMES = 108  # five seconds
_TEXT = "The ferry leaves at ten past four, and whoever is late waits for the morning."


def synthesis_int8_row(device: str) -> Row:
    directory, kind = full_size_voice(), fastest_kind(device)
    (seconds, audio_seconds), peak = fresh(_speak, directory, device)
    (frames, _), _ = fresh(frames_limit, directory, kind, device)
    low = "bfloat16" if kind == "int8" else "float32"
    (decoding, *_), _ = fresh(decode_limit, directory, low, device)
    rate = _FRAMES / audio_seconds
    return Row(
        name=f"synthesis_{kind}",
        figure=seconds / audio_seconds,
        unit="s/s",
        limit=rate / frames + decoding / SECONDS,
        peak_memory_gb=peak,
        workload=f"a sentence of {audio_seconds:.1f} s with its prompt: seconds for one of speech; "
        f"limit: those of generation in {kind} and of decoding in {low}, one after the other",
    )


def _speak(directory: Path, device: str) -> tuple[float, float]:
    """Seconds for a sentence, and how long it is; the second one is measured."""
    from fish_speech.devices import keep_freed_memory
    from fish_speech.inference import Settings, TextToSpeech

    quantize = "int8" if fastest_kind(device) == "int8" else None
    tts = TextToSpeech.from_pretrained(directory, device=device, quantize=quantize)
    keep_freed_memory()  # as cli_tts.py does
    for seed in range(1, 100):
        # Random weights neither end well nor need to: what counts is a speech of this length.
        settings = Settings(seed=seed, max_new_tokens=_FRAMES, retries=0)
        start = perf_counter()
        pieces = list(tts.pieces(_TEXT, settings=settings))
        elapsed = perf_counter() - start
        if seed > 1 and sum(piece.frames for piece in pieces) == _FRAMES:
            break
    return elapsed, sum(piece.waveform.shape[1] for piece in pieces) / tts.sample_rate
