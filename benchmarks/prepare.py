"""Rows `prepare` and `prepare_long`: recordings become a dataset, everything but recognition."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.measure import CACHE, REPOSITORY, BenchmarkRow, in_new_process

_RATE = 16_000
_REPEATS = 8  # of samples/: about a quarter of an hour
_LONG_MINUTES = 60


def prepare_row(device: str) -> BenchmarkRow:
    """A folder of short recordings with transcripts, in as many processes as there are cores."""
    return _row("prepare", _short_clips(), "16 kHz clips of 2 to 5 s")


def prepare_long_row(device: str) -> BenchmarkRow:
    """One long recording with its script, cut and aligned: its memory is that of any length."""
    return _row("prepare_long", _long_recording(), f"one recording of {_LONG_MINUTES} minutes")


def _row(name: str, folder: Path, what: str) -> BenchmarkRow:
    """The limit: silero-vad alone, which reads every frame, on all cores (for one recording on one,
    as it is the work of one process)."""
    (seconds, audio_seconds), peak = in_new_process(_prepare, folder)
    cores = os.cpu_count() or 1 if name == "prepare" else 1
    vad_seconds, _ = in_new_process(_vad_seconds, next(iter(sorted(folder.glob("*.flac")))), 60.0)
    return BenchmarkRow(
        name=name,
        figure=audio_seconds / seconds,
        unit="x real time",
        limit=cores * 60 / vad_seconds,
        peak_memory_gb=peak,
        workload=f"{what}, {audio_seconds / 60:.0f} minutes, levelled and cut; "
        f"limit: voice activity detection alone on {cores} cores",
    )


def _prepare(folder: Path) -> tuple[float, float]:
    from fish_speech.preparation.pipeline import Options, prepare

    with tempfile.TemporaryDirectory() as output:
        options = Options(str(folder), Path(output, "voice"), normalize=True, split_long=True)
        start = perf_counter()
        summary = prepare(options)
        seconds = perf_counter() - start
    return seconds, sum(recording["duration"] for recording in summary.recordings)


def _vad_seconds(path: Path, seconds: float) -> float:
    """How long silero-vad takes for `seconds` of noise on one core."""
    import numpy as np
    import soundfile

    from fish_speech.preparation.segment import find_speech

    find_speech(path, max_seconds=1)  # loads the model
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).normal(0, 0.01, round(seconds * _RATE))
        soundfile.write(Path(folder, "a.wav"), noise, _RATE)
        start = perf_counter()
        find_speech(Path(folder, "a.wav"))
        return perf_counter() - start


def _short_clips() -> Path:
    """`samples/` several times over, each time at another level, made once."""
    folder = CACHE / "clips"
    if not folder.exists():
        in_new_process(_make_short, folder)
    return folder


def _make_short(folder: Path) -> None:
    import soundfile

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for repeat in range(_REPEATS):
        for path in sorted((REPOSITORY / "samples").glob("*.flac")):
            samples, rate = soundfile.read(path)
            copy = part / f"{path.stem}_{repeat}.flac"
            soundfile.write(copy, samples * (1 - 0.05 * repeat), rate)
            shutil.copy(path.with_suffix(".txt"), copy.with_suffix(".txt"))
    part.rename(folder)


def _long_recording() -> Path:
    """`samples/` read again and again with pauses, as one file with one script, made once."""
    folder = CACHE / "long"
    if not folder.exists():
        in_new_process(_make_long, folder)
    return folder


def _make_long(folder: Path) -> None:
    import numpy as np
    import soundfile

    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    paths = sorted((REPOSITORY / "samples").glob("*.flac"))
    texts, seconds, index = [], 0.0, 0
    with soundfile.SoundFile(part / "long.flac", "w", _RATE, 1) as file:
        while seconds < 60 * _LONG_MINUTES:
            path = paths[index % len(paths)]
            samples, _ = soundfile.read(path, dtype="float32")
            pause = 0.3 + 0.2 * (index % 4)
            file.write(np.concatenate([samples, np.zeros(round(pause * _RATE), np.float32)]))
            texts.append(path.with_suffix(".txt").read_text().strip())
            seconds, index = seconds + len(samples) / _RATE + pause, index + 1
    (part / "long.txt").write_text("\n".join(texts))
    part.rename(folder)
