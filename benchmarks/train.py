"""Rows `train_*`: a step of LoRA training at the published size."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from benchmarks.flops import training_flops, training_shapes
from benchmarks.limits import matrix_rate
from benchmarks.measure import BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model

SHORT, LONG = (1, 256), (4, 1024)  # items and tokens of a batch
_MIXED = range(226, 406, 10)  # tokens of clips, with the published tokenizer of 5 to 13 s
_TEXT = (
    "The ferry leaves at ten past four, and whoever is late waits for the morning, "
    "with a book and a flask of tea, in the small room behind the harbour office."
)
_STEPS, _WARM_UP = 8, 2


def train_fp32_row(device: str) -> BenchmarkRow:
    return _same_row("train_fp32", "fp32", device, SHORT)


def train_auto_row(device: str) -> BenchmarkRow:
    """The precision that the package chooses for the device."""
    return _same_row("train_auto", "auto", device, SHORT)


def train_long_row(device: str) -> BenchmarkRow:
    """The same for a batch that fills a GPU."""
    return _same_row("train_long", "auto", device, LONG)


def train_mixed_row(device: str) -> BenchmarkRow:
    """As with clips of people: no batch has a size that was seen before."""
    what = f"one clip each, no two of a length ({_MIXED[0]} to {_MIXED[-1]} tokens)"
    return _row("train_mixed", "auto", device, 1, list(_MIXED), what)


def _same_row(name: str, precision: str, device: str, batch: tuple[int, int]) -> BenchmarkRow:
    items, tokens = batch
    clips = [tokens] * (items + (items > 1))  # one of several is held out
    return _row(name, precision, device, items, clips, f"of {items} x {tokens} tokens")


def _row(
    name: str, precision: str, device: str, items: int, clips: list[int], what: str
) -> BenchmarkRow:
    directory = full_size_model()
    (steps, text, rank, dtype), peak = in_new_process(
        _train, directory, precision, device, items, clips
    )
    seconds, tokens = zip(*steps, strict=True)
    given = (directory, items, tokens, text, rank, dtype, device)
    (flops, rate), _ = in_new_process(_limit, *given)
    return BenchmarkRow(
        name=name,
        figure=median(seconds) if len(set(tokens)) == 1 else mean(seconds),
        unit="s/step",
        limit=flops / rate,
        peak_memory_gb=peak,
        workload=f"LoRA step {what}, {text} of them text, base in {dtype}, "
        f"{flops / 1e12:.2f} TFLOP; limit: {rate / 1e9:.0f} GFLOP/s, the fastest of its products",
    )


def _train(
    directory: Path, precision: str, device: str, items: int, clips: list[int]
) -> tuple[list[tuple[float, int]], int, int, str]:
    """Train as `finetune_tts.py` does, on clips of so many tokens.

    Returns the seconds and the tokens of each step, how many of those are no frames, the
    adapters' rank and the base's dtype.
    """
    import lightning as L

    from fish_speech.datasets.shards import build_shards
    from fish_speech.resources import tune_malloc
    from fish_speech.training.config import compose_config
    from fish_speech.training.resume import choose_start
    from fish_speech.training.runs import Run
    from fish_speech.training.train import train

    tune_malloc()  # as finetune_tts.py does

    class StepTimer(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.ends, self.indices = [perf_counter()], []
            self.dtype = module.model.dtype

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            # A card isn't waited for: it is a step behind at every one, as in a user's run.
            self.ends.append(perf_counter())
            self.indices.append(batch["indices"][-1])

    data, timer, text = Path("data"), StepTimer(), _text_columns(directory)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, tokens in enumerate(clips):
            _write_clip(data / "Ann" / f"{number:02d}_{tokens}", tokens - text)
        manifest, _ = build_shards(data, num_codebooks=8, codebook_size=1024)
        count = max(_STEPS, len(manifest.train)) if len(set(clips)) > 1 else _STEPS
        settings = (f"train.max_steps={count}", f"precision={precision}", f"device={device}")
        kind = ("project=bench", f"data.batch_size={items}", "data.reference_share=0")
        config = compose_config([*kind, *settings])
        config.data.dir = str(data)
        train(
            config,
            base_dir=directory,
            manifest=manifest,
            start=choose_start(Run.of("bench"), data),
            say=lambda message: None,
            callbacks=[timer],
        )
        os.chdir(directory)  # the folder could not be removed from within
    seconds = [end - begin for begin, end in pairwise(timer.ends)]
    tokens = [int(manifest.train[index].rpartition("_")[2]) for index in timer.indices]
    steps = list(zip(seconds, tokens, strict=True))[_WARM_UP:-1]  # the last one is saved, too
    return steps, text, config.lora.r, str(timer.dtype).removeprefix("torch.")


def _text_columns(directory: Path) -> int:
    """The tokens of an item that are no frames."""
    import torch

    from fish_speech.conversation import Utterance, build_item
    from fish_speech.tokenizer import FishTokenizer

    nothing = Utterance(_TEXT, torch.zeros(8, 0, dtype=torch.long))
    return build_item(FishTokenizer.from_pretrained(directory), nothing)[0].shape[1]


def _write_clip(clip: Path, frames: int) -> None:
    import numpy as np
    import soundfile

    clip.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(clip.with_suffix(".wav"), np.zeros(800), 8000)  # nobody listens to it
    clip.with_suffix(".lab").write_text(_TEXT)
    codes = np.random.default_rng(0).integers(0, 1000, (8, frames), dtype=np.int16)
    np.save(clip.with_suffix(".npy"), codes)


def _limit(
    directory: Path,
    items: int,
    tokens: Sequence[int],
    text: int,
    rank: int,
    dtype: str,
    device: str,
) -> tuple[float, float]:
    """The work of a step on the average, and the rate of the fastest of its products."""
    from fish_speech.models.text2semantic import ModelConfig

    config = ModelConfig.from_pretrained(directory)
    flops = items * mean(training_flops(config, count, count - text, rank) for count in tokens)
    usual = round(mean(tokens))
    shapes = training_shapes(config, usual, usual - text)
    return flops, matrix_rate([(items * rows, *sizes) for rows, *sizes in shapes], dtype, device)
