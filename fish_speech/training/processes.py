"""Several processes at work on one run: started by torchrun, by SLURM or by Lightning itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def data_processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that share the preparation of the data.

    Those of torchrun and SLURM start together; until the block ends they are a group for
    `wait_for_all`. A process alone, or one that Lightning starts once the data is ready, is (0, 1).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = "env://"
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment()
        rank, world_size = slurm.global_rank(), slurm.world_size()
        address = f"tcp://{slurm.main_address}:{slurm.main_port}"
    else:
        yield 0, 1
        return
    from torch import distributed

    distributed.init_process_group("gloo", address, rank=rank, world_size=world_size)
    try:
        yield rank, world_size
    finally:
        distributed.destroy_process_group()  # Lightning makes its own


def wait_for_all() -> None:
    """Wait until every process of the group is here; not at all where there is none."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()


def first_then_all(work: Callable[[], T]) -> T:
    """Let the first process do work that the others then find done."""
    if is_first():
        result = work()
        wait_for_all()
        return result
    wait_for_all()
    return work()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # the first that is set decides
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
