"""What a newcomer installs is what the lock says, and what is broken is built again."""

import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT


def versions(text, pattern):
    return {(name.lower(), version) for name, version in re.findall(pattern, text, re.MULTILINE)}


def test_the_constraints_are_those_of_the_lock():
    lock = versions(
        (ROOT / "poetry.lock").read_text(encoding="utf-8"),
        r'^name = "([^"]+)"\nversion = "([^"]+)"',
    )
    constraints = versions(
        (ROOT / "constraints.txt").read_text(encoding="utf-8"), r"^([\w.-]+)==([^\s;]+)"
    )
    assert len(lock) > 80
    assert constraints == lock, (
        "run: poetry export -f constraints.txt --all-extras --without-hashes"
    )


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_package_has_one_version_on_a_python(python):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    needs = [Requirement(line) for line in lines]
    here = {"python_version": python}
    names = [need.name for need in needs if not need.marker or need.marker.evaluate(here)]
    assert len(names) > 80
    assert len(names) == len(set(names))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_whose_python_is_gone_is_built_again(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / ".venv" / ".ready").touch()

    def plan() -> str:
        command = ["make", "-n", "setup"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    assert "pip install" not in plan()
    python.unlink()
    assert "pip install" in plan()


def test_torch_is_pinned():
    assert re.search(r"^torch==2\.13\.0\b", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
