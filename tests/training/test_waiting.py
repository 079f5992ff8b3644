"""A card works while Python prepares its next step: nothing in a step waits for the card."""

import warnings

import lightning as L
import pytest
import torch

from fish_speech.datasets.shards import build_shards
from fish_speech.training.config import compose_config
from fish_speech.training.runs import Run, choose_start
from fish_speech.training.train import train
from tests.made_data import make_data_set


class Waits(L.Callback):
    """What waited for the card, in the steps after the first ones, which make graphs."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 8:
            torch.cuda.set_sync_debug_mode("warn")
            self.catching = warnings.catch_warnings(record=True)
            self.seen = self.catching.__enter__()
            warnings.simplefilter("always")

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 11:
            torch.cuda.set_sync_debug_mode("default")
            self.catching.__exit__(None, None, None)


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
    assert [str(warning.message) for warning in waits.seen] == []
    assert len(Run.of("p").logged("train/loss")) == 14
