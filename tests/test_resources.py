"""What a container or a batch system allows, as control groups say it; threads and freed memory."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fish_speech import devices, resources


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """`groups(membership, files)`: the process's control groups, as text by path."""

    def lay_out(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(resources, "_CGROUP_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    resources.available_cores.cache_clear()
    yield lay_out
    resources.available_cores.cache_clear()


STAT = "anon 900\nfile 300\nactive_file 50\ninactive_file 150\n"


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        pytest.param(
            "0::/\n",
            {
                "cpu.max": "150000 100000\n",
                "memory.max": "2000\n",
                "memory.current": "1200\n",
                "memory.stat": STAT,
            },
            id="a container",
        ),
        pytest.param(
            "0::/slurm/job/step\n",
            {
                "slurm/job/cpu.max": "200000 100000\n",
                "slurm/job/memory.max": "2000\n",
                "slurm/job/memory.current": "1200\n",
                "slurm/job/memory.stat": STAT,
                "slurm/job/step/cpu.max": "max 100000\n",
                "slurm/job/step/memory.max": "max\n",
                "slurm/job/step/memory.current": "1100\n",
            },
            id="a limit of a group above",
        ),
        pytest.param(
            "3:cpu,cpuacct:/docker/1\n2:memory:/docker/1\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "2000\n",
                "memory/memory.usage_in_bytes": "1200\n",
                "memory/memory.stat": "active_file 7\n"
                "total_active_file 50\ntotal_inactive_file 150\n",
            },
            id="version 1, with the host's path",
        ),
    ],
)
def test_a_limit_is_known_however_it_is_written(groups, membership, files):
    groups(membership, files)
    assert resources.available_cores() == 2
    assert resources.cgroup_memory_left() == 1000
    assert resources.free_memory(devices.resolve_device("cpu")) == 1000


def test_where_nothing_is_limited_the_machine_is_what_counts(groups):
    groups(
        "2:memory:/\n1:cpu:/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "1200\n",
        },
    )
    assert resources.available_cores() == 64
    assert resources.cgroup_memory_left() is None
    assert resources.free_memory(devices.resolve_device("cpu")) > 1 << 20


def test_no_more_threads_than_cores():
    before = torch.get_num_threads()
    try:
        resources.set_threads(10_000)
        assert torch.get_num_threads() == resources.available_cores()
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_not_asked_of_the_kernel_again():
    if not hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "gnu_get_libc_version"):
        pytest.skip("not glibc")
    script = """
import resource, sys
from fish_speech.resources import tune_malloc
tune_malloc()
bytearray(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 26)
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 1000)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
