"""Rows `extract` and `pack`: clips become codes, codes become shards."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.limits import time_calls
from benchmarks.measure import CACHE, REPOSITORY, BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model_with_codec

_COPIES = 4  # of samples/: a hundred clips of a few seconds
_BATCH = 8  # finetune_tts.py's own
_UTTERANCES, _SPEAKERS, _FRAMES = 20_000, 10, 100


def extract_row(device: str) -> BenchmarkRow:
    """The limit is the encoder alone, on the same batches, already decoded and padded."""
    directory = full_size_model_with_codec()
    (elapsed, audio_seconds), peak = in_new_process(_extract, directory, device)
    limit, _ = in_new_process(_encode, directory, device)
    return BenchmarkRow(
        name="extract",
        figure=audio_seconds / elapsed,
        unit="x real time",
        limit=audio_seconds / (_COPIES * limit),
        peak_memory_gb=peak,
        workload=f"{audio_seconds / 60:.1f} minutes in clips of 2 to 5 s, batches of {_BATCH}; "
        "limit: the encoder alone",
    )


def pack_row(device: str) -> BenchmarkRow:
    """The limit is reading the same files and writing as many bytes, with nothing in between."""
    folder = _utterances()
    (elapsed, size), peak = in_new_process(_pack, folder)
    limit, _ = in_new_process(_copy, folder, size)
    return BenchmarkRow(
        name="pack",
        figure=_UTTERANCES / elapsed,
        unit="clips/s",
        limit=_UTTERANCES / limit,
        peak_memory_gb=peak,
        workload=f"{_UTTERANCES} utterances of {_FRAMES} frames into {size / 1e6:.0f} MB of shards;"
        " limit: reading the files and writing the bytes",
    )


def _extract(directory: Path, device: str) -> tuple[float, float]:
    from fish_speech.audio_decoding import audio_info
    from fish_speech.models.vqgan import load_codec
    from fish_speech.preparation.extract import extract_codes
    from fish_speech.resources import tune_malloc

    tune_malloc()  # as finetune_tts.py does
    codec = load_codec(directory, device)
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder, "Ann")
        clips.mkdir()
        for path in sorted((REPOSITORY / "samples").glob("*.flac")):
            for copy in range(_COPIES):
                clip = clips / f"{path.stem}_{copy}.flac"
                shutil.copy(path, clip)
                shutil.copy(path.with_suffix(".txt"), clip.with_suffix(".lab"))
        audio_seconds = sum(audio_info(clip).duration for clip in clips.glob("*.flac"))
        start = perf_counter()
        result = extract_codes(Path(folder), codec, directory, batch_size=_BATCH)
        elapsed = perf_counter() - start
    if result.failed:
        raise ValueError(next(iter(result.failed.values())))
    return elapsed, audio_seconds


def _encode(directory: Path, device: str) -> float:
    """Seconds to encode the clips of `samples/` once, batched by length as extraction does."""
    import torch

    from fish_speech.audio import load_audio
    from fish_speech.models.vqgan import load_codec

    codec = load_codec(directory, device)
    paths = sorted((REPOSITORY / "samples").glob("*.flac"))
    waveforms = sorted((load_audio(p, codec.sample_rate)[0][0] for p in paths), key=len)
    batches = []
    for begin in range(0, len(waveforms), _BATCH):
        batch = waveforms[begin : begin + _BATCH]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)[:, None].to(device)
        batches.append((padded, torch.tensor([len(waveform) for waveform in batch])))
    return median(time_calls(lambda: [codec.encode(*batch) for batch in batches], device))


def _utterances() -> Path:
    """A dataset with codes and without sound, made once."""
    folder = CACHE / f"utterances-{_UTTERANCES}"
    if not folder.exists():
        in_new_process(_make_utterances, folder)
    return folder


def _make_utterances(folder: Path) -> None:
    import numpy as np

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    random = np.random.default_rng(0)
    for number in range(_UTTERANCES):
        clip = part / f"speaker_{number % _SPEAKERS}" / f"{number:06d}.wav"
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.touch()  # packing does not listen
        clip.with_suffix(".lab").write_text(f"This is what they say in clip number {number}.")
        codes = random.integers(0, 1000, (8, _FRAMES), dtype=np.int16)
        np.save(clip.with_suffix(".npy"), codes)
    part.rename(folder)


def _pack(folder: Path) -> tuple[float, int]:
    """Seconds, and the bytes of the shards."""
    from fish_speech.datasets.shards import SHARD_FOLDER, build_shards

    shutil.rmtree(folder / SHARD_FOLDER, ignore_errors=True)
    start = perf_counter()
    build_shards(folder, num_codebooks=8, codebook_size=1024)
    elapsed = perf_counter() - start
    return elapsed, sum(shard.stat().st_size for shard in (folder / SHARD_FOLDER).iterdir())


def _copy(folder: Path, size: int) -> float:
    from fish_speech.files import atomic_path

    start = perf_counter()
    for suffix in ("lab", "npy"):
        for path in sorted(folder.glob(f"*/*.{suffix}")):
            path.read_bytes()
    with tempfile.TemporaryDirectory(dir=folder) as place, atomic_path(Path(place, "all")) as file:
        file.write_bytes(bytes(size))
    return perf_counter() - start
