"""Work is spread over processes that end with it."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys

import pytest

from fish_speech.worker_processes import in_processes
from tests.conftest import ROOT


def test_as_many_workers_as_there_are_cores_for_this_process(monkeypatch):
    monkeypatch.setattr("fish_speech.resources.available_cores", lambda: 1)
    done = in_processes(lambda job: os.getpid(), [None] * 64, 0, desc="")
    assert set(done) == {os.getpid()}


def test_no_more_workers_than_windows_can_wait_for(monkeypatch):
    class Started(Exception):
        pass

    def started(workers, *_, **__):
        raise Started(workers)

    monkeypatch.setattr("fish_speech.worker_processes.ProcessPoolExecutor", started)
    monkeypatch.setattr("fish_speech.resources.available_cores", lambda: 96)
    for platform, most in (("win32", 61), ("linux", 96)):
        monkeypatch.setattr(sys, "platform", platform)
        for asked_for in (0, 96):
            with pytest.raises(Started, match=f"^{most}$"):
                next(in_processes(math.sqrt, [4.0] * 2000, asked_for, desc=""))


@pytest.mark.slow
def test_an_interruption_ends_the_workers_and_no_other_process():
    other_end, end = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=end.recv)
    other.start()
    done = in_processes(math.sqrt, [4.0] * 3, 2, desc="")
    assert next(done) == 2
    done.close()
    assert multiprocessing.active_children() == [other]
    other_end.send(None)
    other.join()
    assert other.exitcode == 0


@pytest.mark.slow
def test_a_worker_that_dies_is_said_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="a worker process died; with less memory use --num-work"):
        list(in_processes(os._exit, [1, 1], 2, desc=""))
    script = tmp_path / "script.py"
    script.write_text(
        "from fish_speech.preparation import Options, prepare\n"
        f"prepare(Options({str(ROOT / 'samples')!r}, {str(tmp_path / 'data')!r}, num_workers=2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ValueError: a worker process died at its start: ")
    assert "under if __name__ == '__main__':" in last
