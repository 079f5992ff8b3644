"""What is to be spoken into which file, and what of it is done already."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fish_speech.audio import SAVE_FORMATS, save_format
from fish_speech.files import read_json, safe_name, write_json
from fish_speech.text import is_speakable


@dataclass(frozen=True)
class Job:
    """One text to speak: with which seed, and to which file (None: it is only played)."""

    text: str
    seed: int
    output: Path | None


def default_output(text: str, batch: bool) -> Path:
    """`output/<first words>`: a folder for a batch, else a WAV file."""
    return Path("output", safe_name(text, max_length=40) + ("" if batch else ".wav"))


def plan(
    text: str, output: Path | None, *, batch: bool = False, seed: int = 0, takes: int = 1
) -> list[Job]:
    """The jobs in order: the text, or with `batch` every line of it that has words.

    Each is spoken `takes` times, with `seed`, `seed + 1`, ... Files are `out.wav`, with several
    takes `out_1.wav`, `out_2.wav`, ...; those of a batch bear the number of the line: `0007.wav` in
    the folder `output`, or `out_0007.wav`. Raises `ValueError` where there is nothing to speak or
    `output` can't be written, before anything is made.
    """
    lines = list(enumerate(text.splitlines(), 1)) if batch else [(None, text)]
    spoken = [(number, line) for number, line in lines if is_speakable(line)]
    if not spoken:
        raise ValueError("there is nothing to speak: the text has no letter and no number")
    if takes < 1:
        raise ValueError(f"the number of samples must be at least 1 (is {takes})")
    if output is not None:
        output = _checked(output, batch)
    return [
        Job(line, seed + take, output and _numbered(output, number, take + 1, takes))
        for number, line in spoken
        for take in range(takes)
    ]


def _checked(output: Path, batch: bool) -> Path:
    """`output`, a batch's folder as `FOLDER/_.wav`. Raises `ValueError`: it can't be written."""
    if batch and output.suffix.lower() not in SAVE_FORMATS:
        output = output / "_.wav"
    if output.is_dir():
        raise ValueError(f"{output}: a folder; give a file name, as {output / 'speech.wav'}")
    save_format(output)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{output}: can't be written; {folder} is no folder that you may write to")
    return output


def _numbered(output: Path, number: int | None, take: int, takes: int) -> Path:
    if number is None and takes == 1:
        return output
    stem = "" if output.stem == "_" else output.stem
    marks = [stem, f"{number:04}" if number else "", f"{take}" if takes > 1 else ""]
    return output.with_name("_".join(mark for mark in marks if mark) + output.suffix)


class Ledger:
    """What each file in a folder was made of, in `batch.json` there, so that a batch can go on.

    `made_of` is what all files have in common (model, voice, sampling), as JSON can hold it. A file
    counts as done only where that, its text and its seed are still the same.
    """

    def __init__(self, folder: Path, made_of: Any) -> None:
        self._file, self._made_of = folder / "batch.json", made_of
        self._digests = read_json(self._file) if self._file.exists() else {}

    def has(self, job: Job) -> bool:
        return job.output.exists() and self._digests.get(job.output.name) == self._digest(job)

    def add(self, job: Job) -> None:
        self._digests[job.output.name] = self._digest(job)
        write_json(self._file, self._digests)

    def _digest(self, job: Job) -> str:
        content = json.dumps([self._made_of, job.text, job.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
