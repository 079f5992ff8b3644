"""From recordings to a data set: the order of the work, spread over processes, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fish_speech.audio import level, save_audio
from fish_speech.files import exclusive, remove_temporaries, write_text
from fish_speech.preparation import quality, segment, sources
from fish_speech.preparation.segment import Segment, Speech
from fish_speech.preparation.sources import Recording
from fish_speech.preparation.summary import Books, Record, Summary

SAMPLE_RATE = 44_100  # of the codec, and so of every clip
LONGEST_UNCUT = 120.0  # seconds; one clip this long already fills a training batch
VERSION = 1  # raise it where the same options make other clips: old ones are then made anew


@dataclass(frozen=True)
class Options:
    """What to prepare, where to and how; each field is a flag of prepare_dataset.py."""

    input: str
    output: Path
    speaker: str | None = None
    normalize: bool = False
    split_long: bool = False
    segment_duration: float = 10.0
    min_duration: float = 1.0
    max_duration: float | None = None
    auto_transcribe: bool = False
    num_workers: int = 0
    strict: bool = False
    thresholds: quality.Thresholds = field(default_factory=quality.Thresholds)


def prepare(options: Options, *, say: Callable[[str], None] = lambda message: None) -> Summary:
    """Prepare every recording at `options.input` and compose the summary of the whole data set.

    `say` is given messages for the user. Raises `FileNotFoundError` or `ValueError` where there is
    nothing to prepare or the output is in use; a recording that fails is in the summary instead
    (with `options.strict` it raises `ValueError`). `OSError` means that the output can't be written.
    """
    output = Path(options.output)
    default_speaker = sources.speaker_name(options.speaker or output.resolve().name)
    speaker = default_speaker if options.speaker else None
    found = sources.find_local(options.input, speaker, default_speaker)
    with exclusive(output, f"data set {output}"):
        remove_temporaries(output)
        books = Books(output)
        recordings = sources.name_recordings(found, books.owners())
        work = [
            job for job in (Job(recording, options) for recording in recordings)
            if not books.is_done(job.recording.speaker, job.recording.name, job.recipe)
        ]  # fmt: skip
        if len(work) < len(recordings):
            say(f"{len(recordings) - len(work)} of {len(recordings)} recordings are done already")
        for job in work:
            books.forget(job.recording.speaker, job.recording.name)
        for record in _carry_out(work, options.num_workers):
            books.enter(record)
            if options.strict and record.failure:
                raise ValueError(f"{record.source}: {record.failure}")
        summary = books.compose(options.thresholds)
    names = [(r.speaker, r.name) for r in recordings]
    failed = sum(books.find(*name).failure is not None for name in names)
    return replace(summary, failed=failed)


@dataclass(frozen=True)
class Job:
    """One recording and how it is to be prepared."""

    recording: Recording
    options: Options

    @property
    def recipe(self) -> str:
        """A digest of all that the recording's clips depend on."""
        options, recording = self.options, self.recording
        ingredients = [
            VERSION, recording.digest, recording.transcript, recording.problem,
            options.normalize, options.max_duration, options.min_duration,
            options.segment_duration if options.split_long else None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]

    @property
    def max_seconds(self) -> float | None:
        minutes = self.options.max_duration
        return None if minutes is None else minutes * 60


def carry_out(job: Job) -> Record:
    """Prepare one recording: its clips are written, its record is returned.

    A recording that can't be used comes back as a record with a `failure`. Raises `OSError` only
    where the output can't be written.
    """
    recording = job.recording
    record = Record(
        recording.speaker, recording.name, recording.source, recording.digest, job.recipe,
        origin=recording.origin,
    )  # fmt: skip
    try:
        if recording.problem:
            raise ValueError(recording.problem)
        if recording.transcript is None:
            raise ValueError(
                "has no transcript: put one beside it "
                f"({recording.path.stem}.txt) or use --auto-transcribe"
            )
        speech = segment.find_speech(recording.path, max_seconds=job.max_seconds)
        record.duration = round(speech.duration, 3)
        segments = plan(job, speech)
        record.clips = list(write_clips(job, segments, speech))
    except ValueError as error:
        record.failure = str(error).removeprefix(f"{recording.path}: ")
    return record


def plan(job: Job, speech: Speech) -> list[Segment]:
    """The segments to keep of a recording, with their texts. Raises `ValueError` where none is."""
    options = job.options
    if not speech.islands:
        silent = float(speech.power.max(initial=0.0)) < 1e-8
        raise ValueError("is silent" if silent else "has no speech in it")
    if not options.split_long:
        if speech.duration > LONGEST_UNCUT:
            raise ValueError(f"is {speech.duration:.0f} s long: cut it with --split-long")
        return [Segment(0.0, speech.duration, job.recording.transcript or "")]
    start, end = speech.islands[0][0], speech.islands[-1][1]
    if end - start <= segment.STRETCH * options.segment_duration:
        margin = segment.MARGIN_SECONDS
        whole = Segment(max(0.0, start - margin), min(speech.duration, end + margin))
        return [replace(whole, text=job.recording.transcript or "")]
    raise ValueError("is long: aligning its transcript is yet to come")


def write_clips(job: Job, segments: list[Segment], speech: Speech) -> Iterator[dict[str, Any]]:
    """Cut the segments out of the recording, write each as a clip and yield its summary entry."""
    recording, options = job.recording, job.options
    parts = segment.cut(recording.path, segments, SAMPLE_RATE, max_seconds=job.max_seconds)
    for number, (part, samples) in enumerate(zip(segments, parts, strict=True), 1):
        figures = quality.measure(samples, SAMPLE_RATE, part, speech)
        gain = None
        if options.normalize:
            samples, leveling = level(samples, SAMPLE_RATE)
            gain = round(leveling.gain, 1)
        samples = segment.fade(samples, SAMPLE_RATE) if options.split_long else samples
        file = f"{recording.speaker}/{recording.name}_{number:04d}.wav"
        path = Path(options.output, file)
        save_audio(path, samples, SAMPLE_RATE)
        write_text(path.with_suffix(".lab"), part.text)
        spoken = figures["duration"] * figures["speech_share"]
        yield {
            "file": file,
            "speaker": recording.speaker,
            "text": part.text,
            "source": recording.source,
            "start": round(part.start, 3),
            "end": round(part.end, 3),
            **figures,
            "loudness": quality.loudness(samples, SAMPLE_RATE),
            **({} if gain is None else {"gain": gain}),
            "characters_per_second": quality.characters_per_second(part.text, spoken),
            **({"cut_in_speech": True} if part.cut_in_speech else {}),
            **({"estimated": True} if part.estimated else {}),
        }


def _carry_out(work: list[Job], num_workers: int) -> Iterator[Record]:
    """The records of all jobs as they are done: in this process or in `num_workers` of them.

    0 means as many as pay for their start. What a job yields doesn't depend on who does it.
    """
    workers = num_workers or min(os.cpu_count() or 1, 1 + len(work) // 16)
    with tqdm(total=len(work), desc="preparing", unit="file", disable=None) as progress:
        if workers <= 1:
            for job in work:
                yield carry_out(job)
                progress.update()
            return
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupt)
        try:
            for future in as_completed([pool.submit(carry_out, job) for job in work]):
                yield future.result()
                progress.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl+C reaches the whole process group: only the parent answers it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
