"""A card works while Python prepares its next step: nothing in a step waits for the card."""

import warnings

import lightning as L
import pytest
import torch

from fish_speech.datasets.shards import build_shards
from fish_speech.training.config import compose_config
from fish_speech.training.resume import choose_start
from fish_speech.training.runs import Run
from fish_speech.training.train import train
from tests.synthetic_data import make_data_set

FIRST, LAST = 8, 11  # batches that are watched: the graphs of their sizes are there


class Waits(L.Callback):
    """What waited for the card."""

    def __init__(self):
        self.seen, self._record = [], warnings.catch_warnings(record=True)

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == FIRST:
            self.seen = self._record.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == LAST:
            self._end()

    def on_exception(self, trainer, module, exception):
        self._end()

    def _end(self):
        torch.cuda.set_sync_debug_mode("default")
        self._record.__exit__(None, None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_a_step_does_not_wait_for_the_card(tmp_path, base_dir, monkeypatch, graphs):
    monkeypatch.chdir(tmp_path)
    data, waits = make_data_set(tmp_path / "data", {"Ann": 4}), Waits()
    manifest, _ = build_shards(data, num_codebooks=8, codebook_size=1024)
    settings = ("train.max_steps=14", "train.save_every=100", f"train.cuda_graphs={graphs}")
    config = compose_config(["project=p", "model=tiny", "device=cuda", *settings])
    config.data.dir = str(data)
    start = choose_start(Run.of("p"), data)
    train(config, base_dir=base_dir, manifest=manifest, start=start, say=print, callbacks=[waits])
    waited = [f"{w.filename}:{w.lineno}: {w.message}" for w in waits.seen]
    assert [line for line in waited if "synchronizing CUDA operation" in line] == []
    assert len(Run.of("p").logged("train/loss")) == 14
