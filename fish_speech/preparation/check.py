"""Look at a dataset before training on it: what is there, and what would spoil the voice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from fish_speech.audio_decoding import audio_info, truncation
from fish_speech.console import counted
from fish_speech.datasets.clips import Clip, is_rejected
from fish_speech.files import list_files, shown_path, sidecar_of
from fish_speech.preparation import quality, segment, sources
from fish_speech.preparation.entries import ClipEntry, time_span
from fish_speech.preparation.job import LONGEST_UNCUT, RecordingJob
from fish_speech.preparation.options import Options
from fish_speech.preparation.pipeline import recogniser_for
from fish_speech.preparation.plan import transcribe_segments
from fish_speech.preparation.recording import clip_entry, failure_reason, new_record
from fish_speech.preparation.records import Record
from fish_speech.preparation.segment import Segment
from fish_speech.preparation.summary import Summary
from fish_speech.preparation.transcribe import Recogniser
from fish_speech.worker_processes import in_processes

WORST_CLIPS = 10  # that are named


def check(options: Options, *, say: Callable[[str], None] = lambda message: None) -> Summary:
    """Measure every clip of the dataset at `options.input`, whoever made it; write nothing.

    With `options.auto_transcribe` transcripts are compared with what a recogniser hears, where one
    can be had. Raises `FileNotFoundError` or `ValueError` where there is no dataset.
    """
    folder = Path(options.input)
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sources.find_local(folder, None, sources.speaker_name(folder.resolve().name), say=say)
    jobs = [RecordingJob(recording, options) for recording in sources.name_recordings(found, {})]
    recogniser = None
    if options.auto_transcribe:
        try:
            recogniser = recogniser_for(options)
        except ValueError as error:
            say(f"transcripts are not compared: {error}")
    if recogniser is None:
        records = list(in_processes(inspect_clip, jobs, options.num_workers, desc="preparing"))
    else:
        records = [inspect_clip(job, recogniser) for job in jobs]
    records.sort(key=lambda record: (record.speaker, record.source))
    clips = [
        quality.with_flags(clip, options.thresholds, options.min_duration)
        for record in records
        for clip in record.clips
    ]
    skipped = [
        {"source": record.source, "reason": record.failure}
        for record in records
        if record.failure is not None
    ]
    labels = {
        path
        for path in list_files(folder, lambda error: None)  # which `find_local` has named
        if path.suffix == ".lab" and not is_rejected(path, folder)
    }
    for label in sorted(labels - {item.path.with_suffix(".lab") for item in found}):
        source = sources.printable(shown_path(label))
        skipped.append({"source": source, "reason": "has no recording"})
    return Summary(quality.mark_near_duplicates(clips), skipped, [], [], len(skipped))


def inspect_clip(job: RecordingJob, recogniser: Recogniser | None = None) -> Record:
    """Look at a clip of a dataset as it is, writing nothing: its entry, or why it has none."""
    recording = job.recording
    record = new_record(job)
    try:
        if recording.problem:
            raise ValueError(recording.problem)
        label = recording.path.with_suffix(".lab")
        if not label.is_file():
            other = sidecar_of(recording.path)
            there = f", only {other.name}: prepare it, with --input" if other else ""
            raise ValueError(f"has no transcript {label.name}{there}")
        read = Clip(recording.name, recording.speaker, recording.path).read_text  # as training
        text = sources.collapse_whitespace(read())
        speech = job.find_speech(LONGEST_UNCUT)
        whole = Segment(0.0, speech.duration, text)
        if recogniser is not None:
            whole = replace(whole, heard=next(transcribe_segments(job, [whole], recogniser)).text)
        info = audio_info(recording.path)
        samples = next(segment.cut(recording.path, [whole], info.sample_rate))
        file = sources.printable(recording.path.relative_to(job.options.input).as_posix())
        clip = clip_entry(file, recording, whole, samples, info, speech)
        record.clips = [{**clip, "loudness": quality.loudness(samples, info.sample_rate)}]
        if speech.duration < LONGEST_UNCUT and truncation(recording.path, speech.duration):
            record.clips[0]["breaks_off"] = True
    except Exception as error:
        record.failure = failure_reason(error, recording)
    return record


def has_blocking_flags(summary: Summary) -> bool:
    """Whether a voice would learn something wrong from this dataset: bad sound or wrong texts."""
    return any(quality.BLOCKING_FLAGS & set(clip["flags"]) for clip in summary.clips)


def describe(summary: Summary) -> str:
    """The findings as text: totals, a histogram of durations, flags, the worst clips."""
    clips = summary.clips
    lines = [
        f"Files: {len(clips)}",
        f"Duration: {summary.minutes} min",
        f"Speakers: {', '.join(summary.speakers) or 'none'}",
    ]
    if clips:
        lines += ["", "Durations", *_histogram([clip["duration"] for clip in clips])]
        lines += ["", f"Loudness: {_range(clips, 'loudness')} LUFS, SNR: {_range(clips, 'snr')} dB"]
    compared = [clip for clip in clips if "disagreement" in clip]
    if compared:
        letters = [len(clip["text"]) for clip in compared]
        rate = np.average([clip["disagreement"] for clip in compared], weights=letters)
        lines.append(f"Character error rate against the recogniser: {100 * rate:.1f}%")
    counts = Counter(flag for clip in clips for flag in clip["flags"])
    if counts:
        lines += ["", "Flags"]
        lines += [f"  {flag:<16}{count:>5}" for flag, count in counts.most_common()]
        lines += ["", "Worst clips"]
        worst = sorted(clips, key=lambda clip: -len(clip["flags"]))[:WORST_CLIPS]
        lines += [f"  {c['file']}: {', '.join(c['flags'])}" for c in worst if c["flags"]]
    if estimated := sum(clip.get("estimated", False) for clip in clips):
        lines += [
            "",
            f"Estimated: the text of {estimated} of {counted(len(clips), 'clip')} is what should "
            "take as long to say; listen to some of them (prepare_dataset.py --report), or let "
            "whisper find the words (--auto-transcribe)",
        ]
    if summary.skipped:
        lines += ["", "Left out"]
        lines += [f"  {e['source']}{time_span(e)}: {e['reason']}" for e in summary.skipped]
    return "\n".join([*lines, "", f"Verdict: {_verdict(summary)}"])


def _verdict(summary: Summary) -> str:
    if not summary.clips:
        return "nothing to train on"
    if has_blocking_flags(summary):
        return "some of this would spoil training"
    verdict = "fit to train on, without what is left out" if summary.skipped else "fit to train on"
    repeats = ["duplicate_of" in clip for clip in summary.clips]
    if sum(repeats) > len(repeats) / 2:
        verdict += f", but {sum(repeats)} of {len(repeats)} clips say again what another one says"
    return verdict


def _histogram(durations: list[float], width: int = 40) -> list[str]:
    edges = [0, 1, 2, 3, 5, 10, 15, 20, 30, float("inf")]
    counts = np.histogram(durations, edges)[0]
    names = [f"{low}-{high} s" for low, high in pairwise(edges[:-1])]
    names.append(f"over {edges[-2]} s")
    return [
        f"  {name:>9} {count:>5} {'█' * -(-width * count // max(counts))}".rstrip()
        for name, count in zip(names, counts.tolist(), strict=True)
        if count
    ]


def _range(clips: list[ClipEntry], figure: str) -> str:
    values = [clip[figure] for clip in clips]
    return f"{min(values):.1f} to {max(values):.1f} (median {np.median(values):.1f})"
