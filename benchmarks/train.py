"""Rows `train_*`: a step of LoRA training at the published size."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.full_size import full_size_model
from benchmarks.limits import matrix_rate
from benchmarks.measure import Row, fresh
from benchmarks.work import training_flops, training_shapes

SHORT, LONG = (1, 256), (4, 1024)  # items and columns of a batch
_TEXT = (
    "The ferry leaves at ten past four, and whoever is late waits for the morning, "
    "with a book and a flask of tea, in the small room behind the harbour office."
)
_STEPS, _WARM_UP = 8, 2


def train_fp32_row(device: str) -> Row:
    return _row("train_fp32", "fp32", device, SHORT)


def train_auto_row(device: str) -> Row:
    """The precision that the package chooses for the device."""
    return _row("train_auto", "auto", device, SHORT)


def train_long_row(device: str) -> Row:
    """The same for a batch that fills a GPU."""
    return _row("train_long", "auto", device, LONG)


def _row(name: str, precision: str, device: str, batch: tuple[int, int]) -> Row:
    directory, (items, columns) = full_size_model(), batch
    (seconds, frames, rank, dtype), peak = fresh(_train, directory, precision, device, batch)
    (flops, rate), _ = fresh(_limit, directory, batch, frames, rank, dtype, device)
    return Row(
        name=name,
        figure=seconds,
        unit="s/step",
        limit=flops / rate,
        peak_memory_gb=peak,
        workload=f"LoRA step of {items} x {columns} columns, {frames} of them frames, base in "
        f"{dtype}, {flops / 1e12:.2f} TFLOP; limit: {rate / 1e9:.0f} GFLOP/s, the fastest of its "
        "products",
    )


def _train(
    directory: Path, precision: str, device: str, batch: tuple[int, int]
) -> tuple[float, int, int, str]:
    """Train as `finetune_tts.py` does: seconds a step, frames, rank, and the base's dtype."""
    import lightning as L

    from fish_speech.datasets.shards import build_shards
    from fish_speech.devices import keep_freed_memory
    from fish_speech.training.config import compose_config
    from fish_speech.training.runs import Run, choose_start
    from fish_speech.training.train import train

    keep_freed_memory()  # as finetune_tts.py does

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.ends = [perf_counter()]
            self.dtype = module.model.dtype

        def on_train_batch_end(self, *_: object) -> None:
            # A card isn't waited for: it is a step behind at every one, as in a user's run.
            self.ends.append(perf_counter())

    (items, columns), data, watch = batch, Path("data"), Watch()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for item in range(items + (items > 1)):  # one of several is held out
            frames = _write_clip(data, f"clip{item}", columns, directory)
        settings = (f"train.max_steps={_STEPS}", f"precision={precision}", f"device={device}")
        kind = ("project=bench", f"data.batch_size={items}", "data.reference_share=0")
        config = compose_config([*kind, *settings])
        config.data.dir = str(data)
        train(
            config,
            base_dir=directory,
            manifest=build_shards(data, num_codebooks=8, codebook_size=1024)[0],
            start=choose_start(Run.of("bench"), data),
            say=lambda message: None,
            callbacks=[watch],
        )
        os.chdir(directory)  # the folder could not be removed from within
    steps = [end - begin for begin, end in pairwise(watch.ends)]
    dtype = str(watch.dtype).removeprefix("torch.")
    return median(steps[_WARM_UP:]), frames, config.lora.r, dtype


def _write_clip(data: Path, name: str, columns: int, directory: Path) -> int:
    """A clip that makes an item of so many columns, into a data set; returns its frames."""
    import numpy as np
    import soundfile
    import torch

    from fish_speech.conversation import Utterance, build_item
    from fish_speech.tokenizer import FishTokenizer

    nothing = Utterance(_TEXT, torch.zeros(8, 0, dtype=torch.long))
    text = build_item(FishTokenizer.from_pretrained(directory), nothing)[0].shape[1]
    frames = columns - text
    clip = data / "Ann" / name
    clip.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(clip.with_suffix(".wav"), np.zeros(800), 8000)  # nobody listens to it
    clip.with_suffix(".lab").write_text(_TEXT)
    codes = np.random.default_rng(0).integers(0, 1000, (8, frames), dtype=np.int16)
    np.save(clip.with_suffix(".npy"), codes)
    return frames


def _limit(
    directory: Path, batch: tuple[int, int], frames: int, rank: int, dtype: str, device: str
) -> tuple[float, float]:
    from fish_speech.models.text2semantic import ModelConfig

    (items, columns), config = batch, ModelConfig.from_pretrained(directory)
    shapes = training_shapes(config, columns, frames)
    flops = items * training_flops(config, columns, frames, rank)
    return flops, matrix_rate([(items * rows, *sizes) for rows, *sizes in shapes], dtype, device)
