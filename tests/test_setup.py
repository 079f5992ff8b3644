"""What a newcomer installs is what the lock says."""

import re

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


def test_every_package_has_one_version():
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(names) == len(set(names))


def test_torch_is_pinned():
    assert re.search(r"^torch==2\.13\.0\b", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
