"""The benchmark counts memory and shares as it says, and one bad row does not hide the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.measure import REPOSITORY, Row


def a_row(device: str) -> Row:
    return Row("good", 2.0, "s", 0.5, 1.25, f"on {device}")


def a_bad_row(device: str) -> Row:
    raise ValueError("no such workload")


def test_fraction_is_the_share_of_the_limit_for_times_and_rates():
    assert Row("load", 2.0, "s", 0.5, 1.0, "").fraction == 0.25
    assert Row("train", 2.0, "s/step", 0.5, 1.0, "").fraction == 0.25
    assert Row("generate", 10.0, "frames/s", 40.0, 1.0, "").fraction == 0.25


def test_fresh_process_counts_its_own_memory_only(tmp_path):
    code = (
        "from pathlib import Path; from benchmarks.measure import fresh; import benchmarks.load\n"
        "if __name__ == '__main__':\n"
        "    print(fresh(benchmarks.load._read, Path('zeros'))[1], *fresh(len, 'abc'))"
    )
    (tmp_path / "program.py").write_text(code)
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(200_000_000)
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    reading, length, idle = map(float, result.stdout.split())
    assert 0.2 < reading < 0.3
    assert length == 3
    assert idle < 0.1


def test_failed_row_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROWS", {"bad": a_bad_row, "good": a_row})
    assert run.main(["--json", str(tmp_path / "rows.json"), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "bad: no such workload" in printed.err
    assert "good" in printed.out
    assert "25%" in printed.out
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {
            "name": "good",
            "figure": 2.0,
            "unit": "s",
            "limit": 0.5,
            "fraction": 0.25,
            "peak_memory_gb": 1.25,
        }
    ]


def test_only_measures_what_it_names(monkeypatch, capsys):
    monkeypatch.setattr(run, "ROWS", {"bad": a_bad_row, "good": a_row})
    assert run.main(["--only", "good"]) == 0
    with pytest.raises(SystemExit) as usage:
        run.main(["--only", "nothing"])
    assert usage.value.code == 2
    assert "bad, good" in capsys.readouterr().err.replace("'", "")
