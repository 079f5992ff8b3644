"""From recordings to a dataset: the order of the work, in processes, resumable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from fish_speech.audio_decoding import audio_info
from fish_speech.console import counted, shorten_list
from fish_speech.files import exclusive, list_audio, sidecar_of
from fish_speech.preparation import sources, youtube
from fish_speech.preparation.job import RecordingJob
from fish_speech.preparation.options import Options
from fish_speech.preparation.recording import prepare_recording
from fish_speech.preparation.records import Record, RecordStore
from fish_speech.preparation.sources import Recording
from fish_speech.preparation.summary import Summary, write_summary
from fish_speech.preparation.transcribe import (
    CachedRecogniser,
    NoModelError,
    Recogniser,
    load_recogniser,
)
from fish_speech.worker_processes import in_processes


def prepare(
    options: Options,
    *,
    say: Callable[[str], None] = lambda message: None,
    recogniser: Recogniser | None = None,
) -> Summary:
    """Prepare every recording at `options.input` and write the summary of the whole dataset.

    `say` is given messages for the user; `recogniser` replaces the whisper model that the options
    name. Raises `FileNotFoundError` or `ValueError` where there is nothing to prepare, the output
    is in use or a model that is needed can't be had; a recording that fails is named in the summary
    instead. `OSError` means that writing the output failed.
    """
    options = _validated(options)
    output = options.output
    default_speaker = sources.speaker_name(options.speaker or output.resolve().name)
    speaker = default_speaker if options.speaker else None
    if speaker not in (None, options.speaker):
        say(f"the speaker {options.speaker!r} is written as {speaker}")
    sources.refuse_overlap(options.input, output)
    sources.refuse_folder_of_data_sets(output)
    with exclusive(output, f"dataset {output}"):
        store = RecordStore(output, say)
        store.remove_leftovers()
        if options.youtube:
            found = youtube.fetch(
                options.input, output / youtube.FOLDER, default_speaker,
                cookies=options.cookies, cookies_from_browser=options.cookies_from_browser, say=say,
            )  # fmt: skip
        else:
            found = sources.find_local(
                options.input, speaker, default_speaker, exclude=output, say=say
            )
            found = sources.drop_prepared_clips(found, say)
        recordings = sources.name_recordings(found, store.owners())
        store.update_moved_paths(recordings)
        _warn_of_oddities(recordings, store, say)
        plain, assisted, recogniser = _make_jobs(options, recordings, recogniser, say)
        plain, assisted = (
            [job for job in jobs if not store.is_done(job)] for jobs in (plain, assisted)
        )
        if before := len(recordings) - len(plain) - len(assisted):
            say(f"prepared before: {before} of {counted(len(recordings), 'recording')}")
        # Closed before the summary is written: no worker may still write clips then.
        workers = in_processes(prepare_recording, plain, options.num_workers, desc="preparing")
        with closing(workers) as done:
            for record in chain(done, _with_recogniser(assisted, recogniser)):
                store.commit(record)
                if options.strict and record.failure is not None:
                    break
        summary = write_summary(
            store, options.thresholds, options.min_duration, drop_flagged=options.drop_flagged
        )
        _advise_on_language(options, summary, say)
        known = {output / clip["file"] for r in store.records.values() for clip in r.clips}
        clips = {file for file in list_audio(output) if file.with_suffix(".lab").is_file()}
        if others := sorted(map(str, clips - known)):
            named = shorten_list(others)
            say(f"also in this dataset (added by hand), and will be trained on: {named}")
        return summary


def _warn_of_oddities(
    recordings: list[Recording], store: RecordStore, say: Callable[[str], None]
) -> None:
    """Say which texts were read in a guessed encoding, and who else speaks the same recordings."""
    guessed = [r for r in recordings if r.encoding is not None]
    if guessed:
        say(f"{shorten_list(r.source for r in guessed)}: the text is not UTF-8 and was read as "
            f"{', '.join(sorted({r.encoding for r in guessed}))}; have a look at it")  # fmt: skip
    speakers = defaultdict(set)
    usable = [r for r in recordings if r.problem is None]
    for r in (*filter(store.has_clips, store.records.values()), *usable):
        speakers[r.digest].add(r.speaker)
    shared = [r for r in usable if len(speakers[r.digest]) > 1]
    if shared:
        names = " and by ".join(sorted(set().union(*(speakers[r.digest] for r in shared))))
        say(
            f"{shorten_list(r.source for r in shared)}: in this dataset as spoken by {names}; "
            "if that is wrong, delete the clips of one of them"
        )


def _advise_on_language(options: Options, summary: Summary, say: Callable[[str], None]) -> None:
    """Say which languages a small model took the speech for, where they are not English."""
    found = {account.get("language", "en") for account in summary.recordings} - {"en"}
    small = options.whisper_model in ("tiny", "base")
    if found and small and options.auto_transcribe and options.language is None:
        say(f"whisper {options.whisper_model} took speech for {shorten_list(sorted(found))}: if "
            "that is wrong give --language; if it is right a larger model hears far better, such "
            "as --whisper-model medium")  # fmt: skip


def _validated(options: Options) -> Options:
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
    downloads = Path(options.output, youtube.FOLDER)
    if options.youtube and not (
        options.auto_transcribe or any(map(sidecar_of, downloads.glob("*")))
    ):  # said before the download, which may be long
        raise ValueError("--youtube: a video has no transcript beside it; add --auto-transcribe")
    return replace(
        options,
        output=Path(options.output),
        split_long=options.split_long or options.youtube,
    )


def _make_jobs(
    options: Options,
    recordings: list[Recording],
    recogniser: Recogniser | None,
    say: Callable[[str], None],
) -> tuple[list[RecordingJob], list[RecordingJob], CachedRecogniser | None]:
    """Jobs without and with a recogniser, and the recogniser where there are any of the latter.

    Raises `ValueError` where nothing can be done without a model and it can't be had. Where others
    can be, those that need it are failures; where it would only be of use (for the times of a
    script's words, to check transcripts), its absence is said.
    """
    if not options.auto_transcribe:
        return [RecordingJob(recording, options) for recording in recordings], [], None
    needed = [r for r in recordings if r.problem is None and r.transcript is None]
    useful = [r for r in recordings if r.problem is None and _benefits_from_recogniser(r, options)]
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
    with_recogniser = {id(recording) for recording in (*needed, *useful)}
    cached = None
    if recogniser is not None and with_recogniser:
        cached = CachedRecogniser(recogniser, options.output / sources.RECORDS / "heard.jsonl")
    plain, assisted = [], []
    for recording in recordings:
        if id(recording) in with_recogniser:
            assisted.append(RecordingJob(recording, options, cached.identity))
        else:
            plain.append(RecordingJob(recording, options))
    return plain, assisted, cached


def recogniser_for(options: Options) -> Recogniser:
    """The recogniser that the options name. Raises `ValueError` where it can't be had."""
    return load_recogniser(
        options.whisper_model,
        backend=options.whisper_backend,
        language=options.language,
        device=options.device,
    )


def _benefits_from_recogniser(recording: Recording, options: Options) -> bool:
    """Whether a recogniser helps with a recording that has a transcript already."""
    if recording.transcript is None:
        return False
    if recording.prepared:
        return True  # a clip of a dataset: its transcript is checked
    if not options.split_long:
        return False
    try:
        duration = audio_info(recording.path).duration
    except (ValueError, OSError):
        return False
    return duration is None or duration > RecordingJob(recording, options).longest


def _with_recogniser(
    jobs: list[RecordingJob], recogniser: CachedRecogniser | None
) -> Iterator[Record]:
    """The records of the jobs that need the recogniser, one after the other."""
    if not jobs:  # nor a progress bar
        return
    with tqdm(desc="recognising", unit="s", unit_scale=True, disable=None) as progress:
        progress.total = round(sum(job.seconds for job in jobs))
        for job in jobs:
            yield prepare_recording(job, recogniser, progress.update)
