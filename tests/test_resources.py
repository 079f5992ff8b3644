"""What a container or a batch system allows, read from control groups as the kernel writes them."""

import os

import pytest

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

    monkeypatch.setattr(resources, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(resources, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    resources.cores.cache_clear()
    yield lay_out
    resources.cores.cache_clear()


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
    assert resources.cores() == 2
    assert resources.memory() == 1000
    assert devices.free_memory(devices.resolve_device("cpu")) == 1000


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
    assert resources.cores() == 64
    assert resources.memory() is None
    assert devices.free_memory(devices.resolve_device("cpu")) > 1 << 20
