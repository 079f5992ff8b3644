"""From recordings to a data set: the order of the work, spread over processes, resumable."""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING

from tqdm import tqdm

from fish_speech import resources
from fish_speech.audio_decoding import audio_info
from fish_speech.console import shorten_list
from fish_speech.files import exclusive, list_audio, remove_temporaries
from fish_speech.preparation import sources, youtube
from fish_speech.preparation.clips import Job, carry_out
from fish_speech.preparation.quality import Thresholds
from fish_speech.preparation.summary import Books, Record, Summary
from fish_speech.preparation.transcribe import (
    Journal,
    NoModelError,
    Recogniser,
    load_recogniser,
)

if TYPE_CHECKING:
    from multiprocessing.synchronize import Semaphore


@dataclass(frozen=True)
class Options:
    """What to prepare, where to and how; each field is a flag of prepare_dataset.py."""

    input: str
    output: Path
    speaker: str | None = None
    youtube: bool = False
    cookies: str | None = None
    cookies_from_browser: str | None = None
    normalize: bool = False
    split_long: bool = False
    segment_duration: float = 10.0
    min_duration: float = 1.0
    max_duration: float | None = None
    auto_transcribe: bool = False
    whisper_model: str = "base"
    whisper_backend: str = "auto"
    language: str | None = None
    device: str = "auto"
    num_workers: int = 0
    drop_flagged: bool = False
    strict: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)


def prepare(
    options: Options,
    *,
    say: Callable[[str], None] = lambda message: None,
    recogniser: Recogniser | None = None,
) -> Summary:
    """Prepare every recording at `options.input` and compose the summary of the whole data set.

    `say` is given messages for the user; `recogniser` replaces the whisper model that the options
    name. Raises `FileNotFoundError` or `ValueError` where there is nothing to prepare, the output
    is in use or a model that is needed can't be had; a recording that fails is named in the summary
    instead. `OSError` means that writing the output failed.
    """
    options = _checked(options)
    output = options.output
    default_speaker = sources.speaker_name(options.speaker or output.resolve().name)
    speaker = default_speaker if options.speaker else None
    if speaker not in (None, options.speaker):
        say(f"the speaker {options.speaker!r} is written as {speaker}")
    sources.refuse_overlap(options.input, output)
    with exclusive(output, f"data set {output}"):
        remove_temporaries(output)
        books = Books(output, say)
        if options.youtube:
            found = youtube.fetch(
                options.input, output / youtube.FOLDER, default_speaker,
                cookies=options.cookies, cookies_from_browser=options.cookies_from_browser, say=say,
            )  # fmt: skip
        else:
            found = sources.find_local(options.input, speaker, default_speaker, but=output, say=say)
            found = sources.only_raw(found, say)
        recordings = sources.name_recordings(found, books.owners())
        books.follow(recordings)
        _say_what_is_odd(recordings, books, say)
        plain, heard, journal = _sort_work(options, recordings, recogniser, say)
        plain, heard = ([job for job in jobs if not books.is_done(job)] for jobs in (plain, heard))
        if before := len(recordings) - len(plain) - len(heard):
            say(f"{before} of {len(recordings)} recordings were prepared before")
        # Closed before the summary is composed: no worker may still write clips then.
        with closing(in_processes(carry_out, plain, options.num_workers)) as done:
            for record in chain(done, _listen(heard, journal)):
                books.enter(record)
                if options.strict and record.failure is not None:
                    break
        summary = books.compose(
            options.thresholds, options.min_duration, drop_flagged=options.drop_flagged
        )
        known = {output / clip["file"] for clip in summary.clips}
        clips = {file for file in list_audio(output) if file.with_suffix(".lab").is_file()}
        if others := sorted(map(str, clips - known)):
            say(f"not made here, but clips to train on as well: {shorten_list(others)}")
        return summary


def _say_what_is_odd(
    recordings: list[sources.Recording], books: Books, say: Callable[[str], None]
) -> None:
    """Say which texts were read in a guessed encoding, and who else speaks the same recordings."""
    guessed = [r for r in recordings if r.encoding is not None]
    if guessed:
        say(f"{shorten_list(r.source for r in guessed)}: the text is not UTF-8 and was read as "
            f"{', '.join(sorted({r.encoding for r in guessed}))}; have a look at it")  # fmt: skip
    speakers = defaultdict(set)
    usable = [r for r in recordings if r.problem is None]
    for r in (*filter(books.has_clips, books.records.values()), *usable):
        speakers[r.digest].add(r.speaker)
    shared = [r for r in usable if len(speakers[r.digest]) > 1]
    if shared:
        names = " and by ".join(sorted(set().union(*(speakers[r.digest] for r in shared))))
        say(
            f"{shorten_list(r.source for r in shared)}: in this data set as spoken by {names}; "
            "if that is wrong, delete the clips of one of them"
        )


def _checked(options: Options) -> Options:
    """The options with what they imply. Raises `ValueError` for values that make no sense."""
    for flag, value in (
        ("--segment-duration", options.segment_duration),
        ("--min-duration", options.min_duration),
        ("--max-duration", options.max_duration),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value}: must be over 0")
    if options.min_duration > options.segment_duration:
        raise ValueError(
            f"--min-duration {options.min_duration} exceeds "
            f"--segment-duration {options.segment_duration}"
        )
    if options.num_workers < 0:
        raise ValueError(f"--num-workers {options.num_workers}: must be 0 (automatic) or more")
    return replace(
        options,
        output=Path(options.output),
        split_long=options.split_long or options.youtube,
    )


def _sort_work(
    options: Options,
    recordings: list[sources.Recording],
    recogniser: Recogniser | None,
    say: Callable[[str], None],
) -> tuple[list[Job], list[Job], Journal | None]:
    """Jobs without and with a recogniser, and its journal where there are any of the latter.

    Raises `ValueError` where nothing can be done without a model and it can't be had. Where others
    can be, those that need it are failures; where it would only be of use (for the times of a
    script's words, to check transcripts), its absence is said.
    """
    if not options.auto_transcribe:
        return [Job(recording, options) for recording in recordings], [], None
    needed = [r for r in recordings if r.problem is None and r.transcript is None]
    useful = [r for r in recordings if r.problem is None and _profits(r, options)]
    if (needed or useful) and recogniser is None:
        try:
            recogniser = recogniser_for(options)
        except ValueError as error:
            if needed and not any(r.problem is None and r.transcript for r in recordings):
                if not isinstance(error, NoModelError):
                    raise
                beside = "recordings with transcripts (.txt) beside them need no model"
                raise NoModelError(f"{error}; {beside}") from error
            say(f"{error}; going on without it")
            without = (
                "it has no text beside it, and the recogniser that was to write one is missing"
            )
            lost = set(map(id, needed))
            recordings = [replace(r, problem=without) if id(r) in lost else r for r in recordings]
            needed = useful = []
    listen = {id(recording) for recording in (*needed, *useful)}
    journal = None
    if recogniser is not None and listen:
        journal = Journal(recogniser, options.output / sources.RECORDS / "heard.jsonl")
    jobs = [Job(r, options, journal.identity if id(r) in listen else None) for r in recordings]
    plain = [job for job in jobs if job.recogniser is None]
    return plain, [job for job in jobs if job.recogniser is not None], journal


def recogniser_for(options: Options) -> Recogniser:
    """The recogniser that the options name. Raises `ValueError` where it can't be had."""
    return load_recogniser(
        options.whisper_model,
        backend=options.whisper_backend,
        language=options.language,
        device=options.device,
    )


def _profits(recording: sources.Recording, options: Options) -> bool:
    """Whether a recogniser helps with a recording that has a transcript already."""
    if recording.transcript is None:
        return False
    if recording.prepared:
        return True  # a clip of a data set: its transcript is checked
    if not options.split_long:
        return False
    try:
        duration = audio_info(recording.path).duration
    except (ValueError, OSError):
        return False
    return duration is None or duration > Job(recording, options).longest


def in_processes(
    function: Callable[[Job], Record], work: list[Job], num_workers: int
) -> Iterator[Record]:
    """What `function` makes of all jobs, as it is done: here or in `num_workers` processes.

    0 means as many as pay for their start. What a job yields doesn't depend on who does it.
    """
    workers = min(len(work), num_workers or min(resources.available_cores(), 1 + len(work) // 16))
    if sys.platform == "win32":
        workers = min(workers, 61)  # which is all that Windows waits for at once
    with tqdm(total=len(work), desc="preparing", unit="file", disable=None) as progress:
        if workers <= 1:
            for job in work:
                yield function(job)
                progress.update()
            return
        context = get_context("spawn")
        begun = context.Semaphore(0)
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(begun,))
        finished = False
        try:
            with _interrupted_later():
                futures = [pool.submit(function, job) for job in work]
            for future in as_completed(futures):
                yield future.result()
                progress.update()
            finished = True
        except BrokenProcessPool as error:
            if begun.acquire(block=False):
                remedy = "; with less memory use --num-workers 1"
            else:  # each process runs the script that started it up to there
                remedy = " at its start: put what your script does under if __name__ == '__main__':"
            raise ValueError(f"a worker process died{remedy}") from error
        finally:
            if not finished:  # else the jobs at hand would be waited for
                for worker in list((pool._processes or {}).values()):
                    worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def _listen(work: list[Job], journal: Journal | None) -> Iterator[Record]:
    """The records of the jobs that need the recogniser, one after the other."""
    with tqdm(desc="recognising", unit="s", unit_scale=True, disable=None) as progress:
        progress.total = round(sum(job.seconds for job in work))
        for job in work:
            yield carry_out(job, journal, progress.update)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Hold Ctrl+C back: here, and in processes started meanwhile until they are ready for it."""
    if not hasattr(signal, "pthread_sigmask") or current_thread() is not main_thread():
        yield  # Windows has no such thing; other threads are never interrupted
        return
    came: list[tuple] = []  # blocked is the main thread alone: the kernel may choose another
    usual = signal.signal(signal.SIGINT, lambda *what: came.append(what))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, usual)
        if came and callable(usual):
            usual(*came[0])


def _begin(begun: Semaphore) -> None:
    die_with_parent()
    if hasattr(signal, "pthread_sigmask"):  # ready for what was held back
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    begun.release()


def die_with_parent() -> None:
    """Make a worker end at once with the run that started it: by Ctrl+C, or however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
