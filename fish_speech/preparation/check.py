"""Look at a data set before training on it: what is there, and what would spoil the voice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fish_speech.datasets.clips import is_rejected
from fish_speech.files import list_files, shown_path
from fish_speech.preparation import quality, sources
from fish_speech.preparation.clips import Job, inspect
from fish_speech.preparation.pipeline import Options, in_processes, recogniser_for
from fish_speech.preparation.summary import Summary

WORST = 10  # clips that are named


def check(options: Options, *, say: Callable[[str], None] = lambda message: None) -> Summary:
    """Measure every clip of the data set at `options.input`, whoever made it; write nothing.

    With `options.auto_transcribe` transcripts are compared with what a recogniser hears, where one
    can be had. Raises `FileNotFoundError` or `ValueError` where there is no data set.
    """
    folder = Path(options.input)
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sources.find_local(folder, None, sources.speaker_name(folder.resolve().name), say=say)
    work = [Job(recording, options) for recording in sources.name_recordings(found, {})]
    recogniser = None
    if options.auto_transcribe:
        try:
            recogniser = recogniser_for(options)
        except ValueError as error:
            say(f"transcripts are not compared: {error}")
    if recogniser is None:
        records = list(in_processes(inspect, work, options.num_workers))
    else:
        records = [inspect(job, recogniser) for job in work]
    records.sort(key=lambda record: (record.speaker, record.source))
    clips = [
        quality.judged(clip, options.thresholds, options.min_duration)
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
    return Summary(quality.mark_twins(clips), skipped, [], [], len(skipped))


def spoils(summary: Summary) -> bool:
    """Whether a voice would learn something wrong from this data set: bad sound or wrong texts."""
    return any(quality.SPOILING & set(clip["flags"]) for clip in summary.clips)


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
        worst = sorted(clips, key=lambda clip: -len(clip["flags"]))[:WORST]
        lines += [f"  {c['file']}: {', '.join(c['flags'])}" for c in worst if c["flags"]]
    if summary.skipped:
        lines += ["", "Left out"]
        lines += [f"  {e['source']}{_span(e)}: {e['reason']}" for e in summary.skipped]
    return "\n".join([*lines, "", f"Verdict: {_verdict(summary)}"])


def _verdict(summary: Summary) -> str:
    if not summary.clips:
        return "nothing to train on"
    if spoils(summary):
        return "some of this would spoil training"
    return "fit to train on, without what is left out" if summary.skipped else "fit to train on"


def _span(entry: dict[str, Any]) -> str:
    return f" {entry['start']:.1f}-{entry['end']:.1f} s" if "start" in entry else ""


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


def _range(clips: list[dict[str, Any]], figure: str) -> str:
    values = [clip[figure] for clip in clips]
    return f"{min(values):.1f} to {max(values):.1f} (median {np.median(values):.1f})"
