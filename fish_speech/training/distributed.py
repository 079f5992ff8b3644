"""Several processes at work on one run: started by torchrun, by SLURM or by Lightning itself."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fish_speech.console import Say
from fish_speech.files import InUseError, exclusive

if TYPE_CHECKING:
    from fish_speech.training.config import TrainConfig

T = TypeVar("T")
_MEETING = timedelta(minutes=10)  # which all processes begin within


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that share the preparation of the data.

    Those of torchrun and SLURM start together; until the block ends they are a group for
    `barrier`. A process alone, or one that Lightning starts once the data is ready, is (0, 1).
    """
    if not {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & os.environ.keys():
        yield 0, 1  # at once: Lightning, which knows these environments, takes seconds to import
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = "env://"
    elif SLURMEnvironment.detect():
        slurm = SLURMEnvironment()
        rank, world_size = slurm.global_rank(), slurm.world_size()
        address = f"tcp://{slurm.main_address}:{slurm.main_port}"
    else:
        rank, world_size, address = 0, 1, ""
    if world_size == 1:
        yield 0, 1
        return
    from torch import distributed

    print(f"waiting for all {world_size} processes", file=sys.stderr)
    try:
        store, _, _ = next(distributed.rendezvous(address, rank, world_size, timeout=_MEETING))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the environment speaks of {world_size} processes, which did not all come; start them "
            "with srun or torchrun, or clear SLURM_NTASKS where one is meant"
        ) from error
    # The first process may download or transcribe for hours while the others wait. Lightning makes
    # a group of its own later; under a prefix this one leaves nothing behind that it would find.
    distributed.init_process_group(
        "gloo",
        store=distributed.PrefixStore("process_group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(days=7),
    )
    try:
        yield rank, world_size
    finally:
        distributed.destroy_process_group()


def check_trained_by(world_size: int, settings: TrainConfig) -> None:
    """Raise `ValueError` where other than all of several started processes would train together."""
    if world_size != settings.devices * settings.num_nodes:
        raise ValueError(
            f"{world_size} processes were started for --devices {settings.devices} and --num-nodes "
            f"{settings.num_nodes}; give the number on each machine, and of machines"
        )


def barrier() -> None:
    """Wait until every process of the group is here; not at all where there is none."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()


@contextmanager
def dataset_lock(data_dir: Path, say: Say) -> Iterator[None]:
    """No other run changes the dataset meanwhile: the first process holds its lock for all.

    Where it is taken, wait for it: several projects may be trained on one dataset.
    """
    waited = False
    with ExitStack() as held:
        while is_rank_zero() and data_dir.is_dir():  # else whoever reads it says what is missing
            try:
                held.enter_context(exclusive(data_dir, f"dataset {data_dir}"))
                break
            except InUseError as error:
                if not waited:
                    say(f"waiting (Ctrl+C stops that): {error}")
                waited = True
            time.sleep(1)
        barrier()
        yield
        barrier()


def rank_zero_first(work: Callable[[], T]) -> T:
    """Let the first process do work that the others then find done."""
    if is_rank_zero():
        result = work()
        barrier()
        return result
    barrier()
    return work()


def gather(own: dict[str, str]) -> dict[str, str]:
    """The entries of all processes of the group, in each of them."""
    from torch import distributed

    if not distributed.is_initialized():
        return own
    parts: list[dict[str, str]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ:
        return os.environ["LOCAL_RANK"] == os.environ.get("NODE_RANK", "0") == "0"
    return os.environ.get("SLURM_PROCID", "0") == "0"
