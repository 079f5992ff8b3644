"""What is to be spoken into which file, and what of it is done already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fish_speech.audio import save_format
from fish_speech.files import (
    AUDIO_SUFFIXES,
    exclusive,
    file_digest,
    read_json,
    remove_temporaries,
    safe_name,
    write_json,
)
from fish_speech.text import is_speakable, lines_of

_MODEL_SUFFIXES = (".pth", ".json", ".tiktoken")


@dataclass(frozen=True)
class Job:
    """One text to speak: with which seed, and to which file (None: standard output).

    `only_heard`: the file is for a machine where the speech can't be played.
    """

    text: str
    seed: int
    output: Path | None
    only_heard: bool = False


def default_output(text: str, batch: bool) -> Path:
    """`output/<first words>`: a folder for a batch, else a WAV file. Other words have another."""
    name = safe_name(text, max_length=40)
    if name != safe_name(text):
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return Path("output", name + ("" if batch else ".wav"))


def plan(
    text: str,
    output: Path | None,
    *,
    batch: bool = False,
    seed: int = 0,
    takes: int = 1,
    only_heard: bool = False,
) -> list[Job]:
    """The jobs in order: the text, or with `batch` every line of it that has words.

    Each is spoken `takes` times, with `seed`, `seed + 1`, ... Files are `out.wav`, with several
    takes `out_1.wav`, `out_2.wav`, ...; those of a batch bear the number of the line: `0007.wav` in
    the folder `output`, or `out_0007.wav`. Raises `ValueError` where there is nothing to speak or
    `output` can't be written, before anything is made.
    """
    lines = list(enumerate(lines_of(text), 1)) if batch else [(None, text)]
    spoken = [(number, line) for number, line in lines if is_speakable(line)]
    if not spoken:
        raise ValueError("there is nothing to speak: the text has no letter and no number")
    if takes < 1:
        raise ValueError(f"the number of samples must be at least 1 (is {takes})")
    if output is not None:
        if batch and output.suffix.lower() not in AUDIO_SUFFIXES:
            output = output / "_.wav"
        if not only_heard:
            check_output(output)
    return [
        Job(line, seed + take, output and _numbered(output, number, take + 1, takes), only_heard)
        for number, line in spoken
        for take in range(takes)
    ]


def check_output(output: Path) -> None:
    """Raise `ValueError` where `output` can't be written."""
    try:
        os.fspath(output).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{output}: the name is not UTF-8; give another") from None
    if output.is_dir():
        raise ValueError(f"{output}: a folder; give a file name, as {output / 'speech.wav'}")
    save_format(output)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{output}: can't be written; {folder} is no folder that you may write to")


def _numbered(output: Path, number: int | None, take: int, takes: int) -> Path:
    if number is None and takes == 1:
        return output
    stem = "" if output.stem == "_" else output.stem
    marks = [stem, f"{number:04}" if number else "", f"{take}" if takes > 1 else ""]
    return output.with_name("_".join(mark for mark in marks if mark) + output.suffix)


def do_the_rest(
    jobs: list[Job], made_of: Any, attempt: Callable[[Job], bool]
) -> tuple[int, int, int, list[Path]]:
    """Do the jobs of a batch that are not done yet; `attempt` says whether it succeeded.

    Returns how many were done, were done already, and failed, and the files of earlier batches
    there that are none of this one's. `made_of` as in `Ledger`.
    """
    folder = jobs[0].output.parent
    with exclusive(folder, str(folder)):
        ledger = Ledger(folder, made_of)
        remove_temporaries(folder, [ledger.file.name, *(job.output.name for job in jobs)])
        waiting = [job for job in jobs if not ledger.has(job)]
        done = 0
        for job in waiting:
            if attempt(job):
                ledger.add(job)
                done += 1
    return done, len(jobs) - len(waiting), len(waiting) - done, ledger.others(jobs)


def model_digests(model_dir: Path) -> dict[str, str]:
    """What a model directory's files hold, by name: any of them decides how it sounds."""
    files = [file for file in sorted(model_dir.iterdir()) if file.suffix in _MODEL_SUFFIXES]
    return {file.name: file_digest(file) for file in files}


class Ledger:
    """What each file in a folder was made of, in `batch.json` there, so that a batch can go on.

    `made_of` is what all files have in common (model, voice, sampling), as JSON can hold it. A file
    counts as done only where that, its text and its seed are still the same. Raises `ValueError`
    for a `batch.json` of another kind.
    """

    def __init__(self, folder: Path, made_of: Any) -> None:
        self.file, self._made_of = folder / "batch.json", made_of
        self._digests = self._read() if self.file.exists() else {}

    def has(self, job: Job) -> bool:
        return job.output.exists() and self._digests.get(job.output.name) == self._digest(job)

    def others(self, jobs: list[Job]) -> list[Path]:
        """The files it knows that are none of these jobs'."""
        names = self._digests.keys() - {job.output.name for job in jobs}
        return [file for name in sorted(names) if (file := self.file.with_name(name)).exists()]

    def add(self, job: Job) -> None:
        self._digests[job.output.name] = self._digest(job)
        write_json(self.file, self._digests)

    def _read(self) -> dict[str, str]:
        try:
            digests = read_json(self.file)
        except ValueError:
            digests = None
        if not isinstance(digests, dict):
            raise ValueError(
                f"{self.file}: damaged, or not written by a batch; remove it, and every line is"
                " spoken again"
            )
        return digests

    def _digest(self, job: Job) -> str:
        content = json.dumps([self._made_of, job.text, job.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
