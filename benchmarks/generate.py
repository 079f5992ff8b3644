"""Rows `generate_*`: frames a second of the language model, one voice at a time."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.flops import frame_weights
from benchmarks.limits import read_bandwidth, wait_for
from benchmarks.measure import Row, fresh
from benchmarks.random_model import full_size_model

_PROMPT = 128  # columns: a sentence, and a short one before it
_EARLY, _LATE = 64, 2000  # columns: nearly nothing, and a page
_FRAMES = 60
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def generate_fp32_row(device: str) -> Row:
    return _row("fp32", device)


def generate_bf16_row(device: str) -> Row:
    return _row("bf16", device)


def generate_int8_row(device: str) -> Row:
    return _row("int8", device)


def fastest_kind(device: str) -> str:
    """The weights with which a frame takes least on a device."""
    return "int8" if device == "cpu" else "bf16"


def generate_late_row(device: str) -> Row:
    """With the fastest weights, where everything else costs least."""
    directory, kind = full_size_model(), fastest_kind(device)
    early, _ = fresh(_generate, directory, kind, device, _EARLY)
    late, peak = fresh(_generate, directory, kind, device, _LATE)
    return Row(
        name="generate_late",
        figure=1 / late,
        unit="frames/s",
        limit=1 / early,
        peak_memory_gb=peak,
        workload=f"{kind} after a prompt of {_LATE} columns; limit: after {_EARLY}",
    )


def frames_limit(directory: Path, kind: str, device: str) -> tuple[float, float]:
    """Frames a second that the memory could feed, and its bandwidth in bytes a second."""
    from fish_speech.models.text2semantic import ModelConfig

    bandwidth = read_bandwidth(device)
    weights = frame_weights(ModelConfig.from_pretrained(directory))
    return bandwidth / (weights * _BYTES[kind]), bandwidth


def _row(kind: str, device: str) -> Row:
    directory = full_size_model()
    seconds, peak = fresh(_generate, directory, kind, device, _PROMPT)
    (limit, bandwidth), _ = fresh(frames_limit, directory, kind, device)
    return Row(
        name=f"generate_{kind}",
        figure=1 / seconds,
        unit="frames/s",
        limit=limit,
        peak_memory_gb=peak,
        workload=f"after a prompt of {_PROMPT} columns (real time is 21.5); limit: every weight of"
        f" a frame read once at {bandwidth / 1e9:.1f} GB/s",
    )


def _generate(directory: Path, kind: str, device: str, columns: int) -> float:
    """The median seconds a frame after a prompt, which the first frame of a speech takes."""
    import torch

    from fish_speech.devices import triton_unavailable_reason
    from fish_speech.inference.generate import capture_frame_graphs, generate
    from fish_speech.inference.sampling import Sampling
    from fish_speech.models.text2semantic import load_model
    from fish_speech.models.text2semantic.decode.packed import pack
    from fish_speech.resources import tune_malloc
    from fish_speech.tokenizer import FishTokenizer

    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = pack(load_model(directory, device, dtype), "int8" if kind == "int8" else None)
    tune_malloc()  # as cli_tts.py does
    tokenizer = FishTokenizer.from_pretrained(directory)
    graphs = (
        None
        if triton_unavailable_reason(model.device)
        else capture_frame_graphs(model, tokenizer.im_end_id)
    )
    random = torch.Generator().manual_seed(0)
    prompt = torch.zeros(model.config.num_codebooks + 1, columns, dtype=torch.long)
    prompt[0] = torch.randint(0, 256, (columns,), generator=random)
    times: list[float] = []
    for seed in range(_FRAMES):  # a speech of random weights may end at any time
        frames = generate(
            model,
            prompt,
            im_end_id=tokenizer.im_end_id,
            max_new_tokens=_FRAMES + 1,
            sampling=Sampling(),
            generator=torch.Generator(device).manual_seed(seed),
            graphs=graphs,
        )
        next(frames, None)
        start = perf_counter()
        for _ in frames:
            wait_for(device)
            times.append(perf_counter() - start)
            start = perf_counter()
        if len(times) >= _FRAMES // 2:
            break
    return median(times)
