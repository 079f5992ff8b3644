"""Which text is to be spoken into which file, and which of a batch are done already."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_speech.audio import is_whole, save_format
from fish_speech.files import (
    AUDIO_SUFFIXES,
    atomic_path,
    exclusive,
    file_digest,
    read_json,
    remove_temporaries,
    safe_name,
    write_json,
)
from fish_speech.text import is_speakable, split_lines

if TYPE_CHECKING:
    from fish_speech.inference.speech import Settings
    from fish_speech.inference.synthesize import TextToSpeech

_MODEL_SUFFIXES = (".pth", ".json", ".tiktoken")


@dataclass(frozen=True)
class SpeechJob:
    """One text to speak: with which seed, and to which file (None: standard output).

    `playback_only`: the file is written only where the speech can't be played.
    """

    text: str
    seed: int
    output: Path | None
    playback_only: bool = False


def default_output(text: str, batch: bool, takes: int = 1) -> Path:
    """`output/<first words>`: a folder for a batch, else a WAV file. Other words give another.

    A name that nobody gave replaces no earlier take: of a file, the first that is free.
    """
    name = safe_name(text, max_length=40)
    if name != safe_name(text):
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    if batch:  # which goes on in the same folder
        return Path("output", name)
    for number in count(1):
        output = Path("output", f"{name}-{number}.wav" if number > 1 else f"{name}.wav")
        files = (_numbered_path(output, None, take + 1, takes) for take in range(takes))
        if not any(file.exists() for file in files):
            return output


def plan(
    text: str,
    output: Path | None,
    *,
    batch: bool = False,
    seed: int = 0,
    takes: int = 1,
    playback_only: bool = False,
) -> list[SpeechJob]:
    """The jobs in order: the text, or with `batch` every line of it that has words.

    Each is spoken `takes` times, with `seed`, `seed + 1`, ... Files are `out.wav`, with several
    takes `out_1.wav`, `out_2.wav`, ...; those of a batch bear the number of the line: `0007.wav` in
    the folder `output`, or `out_0007.wav`. Raises `ValueError` where there is nothing to speak or
    `output` can't be written, before anything is made.
    """
    lines = list(enumerate(split_lines(text), 1)) if batch else [(None, text)]
    spoken = [(number, line) for number, line in lines if is_speakable(line)]
    if not spoken:
        raise ValueError("there is nothing to speak: the text has no letter and no number")
    if takes < 1:
        raise ValueError(f"the number of samples must be at least 1 (is {takes})")
    if output is not None:
        if batch and output.suffix.lower() not in AUDIO_SUFFIXES:
            output = output / "_.wav"
        if not playback_only:
            check_output(output)
    return [
        SpeechJob(
            line,
            seed + take,
            output and _numbered_path(output, number, take + 1, takes),
            playback_only,
        )
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


def _numbered_path(output: Path, number: int | None, take: int, takes: int) -> Path:
    if number is None and takes == 1:
        return output
    stem = "" if output.stem == "_" else output.stem
    marks = [stem, f"{number:04}" if number else "", f"{take}" if takes > 1 else ""]
    return output.with_name("_".join(mark for mark in marks if mark) + output.suffix)


def run_pending_jobs(
    jobs: list[SpeechJob], fingerprint: Any, run: Callable[[SpeechJob], bool]
) -> tuple[int, int, int, list[Path]]:
    """Run the jobs of a batch that are not done yet; `run` returns whether one succeeded.

    Returns how many were run, skipped and failed, and the files there that are left over from
    earlier batches. `fingerprint` as in `BatchState`.
    """
    folder = jobs[0].output.parent
    with exclusive(folder, str(folder)):
        state = BatchState(folder, fingerprint)
        remove_temporaries(folder, [state.file.name, *(job.output.name for job in jobs)])
        state.reuse(jobs)
        pending = [job for job in jobs if not state.is_done(job)]
        done = 0
        for job in pending:
            if run(job):
                state.mark_done(job)
                done += 1
    return done, len(jobs) - len(pending), len(pending) - done, state.leftovers(jobs)


def model_digests(model_dir: Path) -> dict[str, str]:
    """The digest of each file of a model directory that decides how it sounds, by name."""
    files = [file for file in sorted(model_dir.iterdir()) if file.suffix in _MODEL_SUFFIXES]
    return {file.name: file_digest(file) for file in files}


def job_fingerprint(
    model_dir: Path,
    tts: TextToSpeech,
    references: Sequence[tuple[str, str]],
    settings: Settings,
    *,
    speaker: str | None,
    quantize: str | None,
    trim_silence: bool,
) -> list[Any]:
    """All that decides how a job sounds but its text and seed, defaults of the machine included.

    As JSON can hold it. `references` are recordings and their texts.
    """
    machine = [tts.model.device.type, str(tts.model.stored_dtype), quantize]
    machine += ["graphs"] if tts.compiled else []
    voice = [speaker, [(file_digest(file), text) for file, text in references], trim_silence]
    return [model_digests(model_dir), machine, voice, asdict(replace(settings, seed=0))]


class BatchState:
    """A digest of each file's inputs, in `batch.json` in its folder, so that a batch can resume.

    `fingerprint` is what all files have in common (see `job_fingerprint`). A file counts as done
    only where that, its text and its seed are still the same, and it is whole. Raises `ValueError`
    for a `batch.json` that is no such record.
    """

    def __init__(self, folder: Path, fingerprint: Any) -> None:
        self.file, self._fingerprint = folder / "batch.json", fingerprint
        self._digests = self._read() if self.file.exists() else {}

    def is_done(self, job: SpeechJob) -> bool:
        same = self._digests.get(job.output.name) == self._digest(job)
        return same and is_whole(job.output)

    def reuse(self, jobs: list[SpeechJob]) -> None:
        """Copy what was spoken of the same lines under other numbers into the files of these jobs.

        None of these is replaced before all copies are there, and the record of them is removed
        first: whatever happens in between, no file passes for another.
        """
        spoken = {
            (digest, Path(name).suffix): self.file.with_name(name)
            for name, digest in self._digests.items()
        }
        wanted = {job.output.name: self._digest(job) for job in jobs}
        found = {
            name: file
            for name, digest in wanted.items()
            if self._digests.get(name) != digest
            and (file := spoken.get((digest, Path(name).suffix)))
            and is_whole(file)
        }
        if not found:
            return
        with ExitStack() as stack:
            for name, file in found.items():
                shutil.copyfile(file, stack.enter_context(atomic_path(self.file.with_name(name))))
            self._digests = {name: d for name, d in self._digests.items() if name not in found}
            write_json(self.file, self._digests)
        self._digests |= {name: wanted[name] for name in found}
        write_json(self.file, self._digests)

    def leftovers(self, jobs: list[SpeechJob]) -> list[Path]:
        """Files of earlier batches that none of these jobs writes."""
        names = self._digests.keys() - {job.output.name for job in jobs}
        return [file for name in sorted(names) if (file := self.file.with_name(name)).exists()]

    def mark_done(self, job: SpeechJob) -> None:
        self._digests[job.output.name] = self._digest(job)
        write_json(self.file, self._digests)

    def _read(self) -> dict[str, str]:
        try:
            digests = read_json(self.file)
        except ValueError:
            digests = None
        if not (isinstance(digests, dict) and all(isinstance(d, str) for d in digests.values())):
            raise ValueError(
                f"{self.file}: damaged, or not written by a batch; remove it, and every line is"
                " spoken again"
            )
        return digests

    def _digest(self, job: SpeechJob) -> str:
        content = json.dumps([self._fingerprint, job.text, job.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
