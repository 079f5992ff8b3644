"""One recording becomes clips: find the speech, plan what to keep, cut, measure, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fish_speech.audio import normalize_loudness, resample, save_audio
from fish_speech.audio_decoding import AudioInfo, audio_info
from fish_speech.files import write_text
from fish_speech.preparation import error_rates, quality, segment, sources, transcribe
from fish_speech.preparation.entries import ClipEntry
from fish_speech.preparation.job import RecordingJob
from fish_speech.preparation.plan import (
    Plan,
    ends_in_speech,
    make_plan,
    missing_audio,
    segments_without_text,
    skipped_entry,
    without_last_region,
)
from fish_speech.preparation.records import STAGING, Record
from fish_speech.preparation.segment import Segment, Speech
from fish_speech.preparation.sources import Recording

SAMPLE_RATE = 44_100  # Hz; of the codec, and so of every clip
LANGUAGE_SEGMENTS = 12  # of a recording, to tell its language by


def prepare_recording(
    job: RecordingJob,
    recogniser: transcribe.CachedRecogniser | None = None,
    progress: Callable[[float], Any] = lambda seconds: None,
) -> Record:
    """Prepare one recording: its clips are written under `STAGING`, its record is returned.

    A recording that can't be used comes back as a record with a `failure`, whatever the reason.
    Raises `OSError` only where the output can't be written.
    """
    recording = job.recording
    record = new_record(job)
    try:
        if recording.problem:
            raise ValueError(recording.problem)
        if recording.transcript is None and recogniser is None:
            beside = f"put one beside it ({recording.path.stem}.txt) or "
            raise ValueError(
                f"has no transcript: {'' if recording.origin else beside}use --auto-transcribe"
            )
        speech = job.find_speech()
        record.duration = round(speech.duration, 3)
        missing = missing_audio(job, speech)
        cut_off = ends_in_speech(job, speech)
        used = without_last_region(job, speech) if cut_off else speech
        segments = segments_without_text(job, used)
        if recogniser is not None:
            first = job.cut(segments[:LANGUAGE_SEGMENTS], transcribe.SAMPLE_RATE)
            recogniser = recogniser.with_language_of(first)
            record.language = recogniser.language
        plan = make_plan(job, used, segments, recogniser, progress)
        record.skipped = plan.skipped
        record.clips = list(write_clips(job, plan, used))
        if used is not speech:
            rest = Segment(used.duration, speech.duration)
            record.skipped.append(skipped_entry(job, rest, "--max-duration ends in it"))
        elif cut_off and record.clips[-1]["end"] > speech.regions[-1][0]:
            record.clips[-1]["cut_in_speech"] = True
        if missing:
            record.clips[-1]["breaks_off"] = True
            reason = f"{missing}; what is there is used"
            record.skipped.append({"source": recording.source, "reason": reason})
    except OSError:
        raise
    except Exception as error:
        record.failure = failure_reason(error, recording)
        record.duration = record.duration or round(job.seconds, 3)
        record.skipped, record.clips = [], []
    return record


def new_record(job: RecordingJob) -> Record:
    """A record of the job's recording, in which nothing is noted yet."""
    recording = job.recording
    return Record(
        recording.speaker, recording.name, recording.source, recording.address, recording.digest,
        job.fingerprint, origin=recording.origin, scripted=recording.transcript is not None,
        encoding=recording.encoding,
    )  # fmt: skip


def failure_reason(error: Exception, recording: Recording) -> str:
    """Why a recording can't be used, on one line."""
    line = sources.first_line(error, recording.path)
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def write_clips(job: RecordingJob, plan: Plan, speech: Speech) -> Iterator[ClipEntry]:
    """Cut the segments out of the recording, write each as a clip and yield its entry."""
    recording, options = job.recording, job.options
    info = audio_info(recording.path)
    parts = job.cut(plan.segments, info.sample_rate)
    for number, (part, samples) in enumerate(zip(plan.segments, parts, strict=True), 1):
        file = f"{recording.speaker}/{recording.name}_{number:04d}.wav"
        clip = clip_entry(file, recording, part, samples, info, speech)
        samples = resample(samples, info.sample_rate, SAMPLE_RATE)
        if options.normalize:
            samples, leveling = normalize_loudness(samples, SAMPLE_RATE)
            clip["loudness"] = quality.finite(leveling.loudness)
            clip["gain"], clip["dc_offset"] = round(leveling.gain, 1), round(leveling.offset, 4)
        else:
            clip["loudness"] = quality.loudness(samples, SAMPLE_RATE)
        samples = segment.fade_edges(samples, SAMPLE_RATE) if options.split_long else samples
        path = Path(options.output, STAGING, file)
        save_audio(path, samples, SAMPLE_RATE)
        write_text(path.with_suffix(".lab"), part.text)
        yield clip


def clip_entry(
    file: str,
    recording: Recording,
    part: Segment,
    samples: np.ndarray,
    info: AudioInfo,
    speech: Speech,
) -> ClipEntry:
    """The entry of a clip, from its samples [N] as they are in the recording.

    (Resampling would hide clipping: it rounds the flat tops.)
    """
    clip: ClipEntry = {
        "file": file,
        "speaker": recording.speaker,
        "text": part.text,
        "source": recording.source,
        "start": round(part.start, 3),
        "end": round(part.end, 3),
        **quality.measure(samples, info.sample_rate, part, speech, floating=info.floating),
    }
    if recording.transcript is not None and part.heard is not None:
        clip["disagreement"] = error_rates.disagreement(part.text, part.heard)
        clip["heard"] = part.heard
    for name in ("cut_in_speech", "estimated", "no_speech", "unheard"):
        if value := getattr(part, name):
            clip[name] = value
    return clip
