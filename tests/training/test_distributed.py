"""Processes that were started together find each other, or say why they don't."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fish_speech.training import distributed
from fish_speech.training.config import TrainConfig


def test_processes_that_never_come_are_not_waited_for_in_silence(monkeypatch, capsys):
    """A batch job of two tasks in which the program was started once, without srun."""
    slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 7}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    with pytest.raises(ValueError, match="srun"), distributed.process_group():
        pass
    assert "waiting for all 2 processes" in capsys.readouterr().err


def test_all_processes_that_were_started_train_together():
    distributed.check_trained_by(4, TrainConfig(devices=2, num_nodes=2))
    with pytest.raises(ValueError, match="2 processes were started for --devices 1"):
        distributed.check_trained_by(2, TrainConfig(devices=1, num_nodes=1))
