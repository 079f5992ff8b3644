"""Rows `codec_*`: ten seconds of audio to codes, and back."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.flops import flops_of, module_shapes
from benchmarks.limits import matrix_rate, time_calls
from benchmarks.measure import BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model_with_codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from fish_speech.models.vqgan import Codec

SECONDS = 10.0


def codec_decode_fp32_row(device: str) -> BenchmarkRow:
    return _row("codec_decode_fp32", "decode", "float32", device)


def codec_decode_bf16_row(device: str) -> BenchmarkRow:
    return _row("codec_decode_bf16", "decode", "bfloat16", device)


def codec_encode_row(device: str) -> BenchmarkRow:
    return _row("codec_encode", "encode", "float32", device)


def decode_limit(directory: Path, dtype: str, device: str) -> tuple[float, float, float]:
    """Least seconds for ten seconds of audio, FLOP, and FLOP/s of the fastest of its products."""
    return _limit(directory, "decode", dtype, device)


def _row(name: str, direction: str, dtype: str, device: str) -> BenchmarkRow:
    directory = full_size_model_with_codec()
    times, peak = in_new_process(_time, directory, direction, dtype, device)
    (limit, flops, rate), _ = in_new_process(_limit, directory, direction, dtype, device)
    return BenchmarkRow(
        name=name,
        figure=median(times),
        unit="s",
        limit=limit,
        peak_memory_gb=peak,
        workload=f"{SECONDS:.0f} s of audio, {flops / 1e9:.0f} GFLOP; "
        f"limit: {rate / 1e9:.0f} GFLOP/s, the fastest of its products",
    )


def _time(directory: Path, direction: str, dtype: str, device: str) -> list[float]:
    from fish_speech.resources import tune_malloc

    _, call = _prepare(directory, direction, dtype, device)
    tune_malloc()  # as the programs do
    return time_calls(call, device)


def _limit(directory: Path, direction: str, dtype: str, device: str) -> tuple[float, float, float]:
    shapes = module_shapes(*_prepare(directory, direction, "float32", device))
    rate = matrix_rate({shape for shape, groups in shapes if groups == 1}, dtype, device)
    flops = flops_of(shapes)
    return flops / rate, flops, rate


def _prepare(
    directory: Path, direction: str, dtype: str, device: str
) -> tuple[Codec, Callable[[], object]]:
    """The codec, and a call of it as extraction and synthesis make it."""
    import torch

    from fish_speech.models.vqgan import load_codec

    codec = load_codec(directory, device, getattr(torch, dtype))
    random = torch.Generator().manual_seed(0)
    if direction == "encode":
        samples = round(SECONDS * codec.sample_rate)
        waveforms = 0.1 * torch.randn(1, 1, samples, generator=random).to(device)
        return codec, lambda: codec.encode(waveforms)
    shape = 1, codec.num_codebooks, round(SECONDS * codec.frame_rate)
    codes = torch.randint(codec.codebook_size, shape, generator=random).to(device)
    return codec, lambda: codec.decode(codes)
