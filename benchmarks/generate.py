"""Rows `generate_*`: frames a second of the language model, batch size 1."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.flops import frame_weights
from benchmarks.limits import read_bandwidth, synchronize
from benchmarks.measure import BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model

_PROMPT = 128  # tokens: a sentence, and a short one before it
_EARLY, _LATE = 64, 2000  # tokens: nearly nothing, and a page
_FRAMES = 60
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def generate_fp32_row(device: str) -> BenchmarkRow:
    return _row("fp32", device)


def generate_bf16_row(device: str) -> BenchmarkRow:
    return _row("bf16", device)


def generate_int8_row(device: str) -> BenchmarkRow:
    return _row("int8", device)


def fastest_precision(device: str) -> str:
    """The precision of the weights with which a frame is fastest on a device."""
    return "int8" if device == "cpu" else "bf16"


def generate_late_row(device: str) -> BenchmarkRow:
    """With the fastest weights, where everything else costs least."""
    directory, precision = full_size_model(), fastest_precision(device)
    early, _ = in_new_process(_generate, directory, precision, device, _EARLY)
    late, peak = in_new_process(_generate, directory, precision, device, _LATE)
    return BenchmarkRow(
        name="generate_late",
        figure=1 / late,
        unit="frames/s",
        limit=1 / early,
        peak_memory_gb=peak,
        workload=f"{precision} after a prompt of {_LATE} tokens; limit: after {_EARLY}",
    )


def frames_limit(directory: Path, precision: str, device: str) -> tuple[float, float]:
    """Frames a second that the memory could feed, and its bandwidth in bytes a second."""
    from fish_speech.models.text2semantic import ModelConfig

    bandwidth = read_bandwidth(device)
    weights = frame_weights(ModelConfig.from_pretrained(directory))
    return bandwidth / (weights * _WEIGHT_BYTES[precision]), bandwidth


def _row(precision: str, device: str) -> BenchmarkRow:
    directory = full_size_model()
    seconds, peak = in_new_process(_generate, directory, precision, device, _PROMPT)
    (limit, bandwidth), _ = in_new_process(frames_limit, directory, precision, device)
    return BenchmarkRow(
        name=f"generate_{precision}",
        figure=1 / seconds,
        unit="frames/s",
        limit=limit,
        peak_memory_gb=peak,
        workload=f"after a prompt of {_PROMPT} tokens (real time is 21.5); limit: every weight of"
        f" a frame read once at {bandwidth / 1e9:.1f} GB/s",
    )


def _generate(directory: Path, precision: str, device: str, tokens: int) -> float:
    """Median seconds a frame after a prompt, without the first frame, which reads the prompt."""
    import torch

    from fish_speech.devices import triton_unavailable_reason
    from fish_speech.inference.generate import capture_frame_graphs, generate
    from fish_speech.inference.sampling import Sampling
    from fish_speech.models.text2semantic import load_model
    from fish_speech.models.text2semantic.decode.packed import pack
    from fish_speech.resources import tune_malloc
    from fish_speech.tokenizer import FishTokenizer

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = pack(load_model(directory, device, dtype), "int8" if precision == "int8" else None)
    tune_malloc()  # as cli_tts.py does
    tokenizer = FishTokenizer.from_pretrained(directory)
    graphs = (
        None
        if triton_unavailable_reason(model.device)
        else capture_frame_graphs(model, tokenizer.im_end_id)
    )
    random = torch.Generator().manual_seed(0)
    prompt = torch.zeros(model.config.num_codebooks + 1, tokens, dtype=torch.long)
    prompt[0] = torch.randint(0, 256, (tokens,), generator=random)
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
            synchronize(device)
            times.append(perf_counter() - start)
            start = perf_counter()
        if len(times) >= _FRAMES // 2:
            break
    return median(times)
