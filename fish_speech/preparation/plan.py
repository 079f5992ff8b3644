"""What to keep of a recording, and with which texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from fish_speech.audio_decoding import audio_info, truncation
from fish_speech.preparation import align, segment, transcribe
from fish_speech.preparation.entries import SkippedEntry
from fish_speech.preparation.job import LONGEST_UNCUT, RecordingJob
from fish_speech.preparation.segment import Segment, Speech, SpeechPiece
from fish_speech.preparation.transcribe import Recogniser, Transcription
from fish_speech.text import is_speakable

TOUCHES_SECONDS = 0.1  # before the end of what is used, in which the VAD sees no pause
SILENT, QUIET = 1e-8, 1e-5  # power: below these nothing, or no speech, can be heard


@dataclass(frozen=True)
class Plan:
    """What to keep of a recording and what not."""

    segments: list[Segment]
    skipped: list[SkippedEntry]


def missing_audio(job: RecordingJob, speech: Speech) -> str | None:
    """How the recording ends before it should, if it does.

    Raises `ValueError` where it was ended by `--max-duration` and its transcript wasn't.
    """
    limit = job.max_seconds
    if limit is None or speech.duration < limit - 0.01:
        return truncation(job.recording.path, speech.duration)
    length = audio_info(job.recording.path).duration
    if job.recording.transcript is not None and (length is None or length > limit + 1):
        raise ValueError(
            "is longer than --max-duration, and its transcript can't be cut with it: shorten both, "
            "or take the transcript away and use --auto-transcribe"
        )
    return None


def ends_in_speech(job: RecordingJob, speech: Speech) -> bool:
    """Whether `--max-duration` ends where somebody speaks on."""
    limit = job.max_seconds
    if limit is None or not speech.regions or speech.regions[-1][1] < limit - TOUCHES_SECONDS:
        return False
    length = audio_info(job.recording.path).duration
    return length is None or length > limit + TOUCHES_SECONDS


def without_last_region(job: RecordingJob, speech: Speech) -> Speech:
    """`speech` up to its last pause, unless a script has those words or they exceed a clip."""
    if job.recording.transcript is not None or len(speech.regions) < 2:
        return speech
    (_, pause), (start, end) = speech.regions[-2:]
    if end - start > job.longest:
        return speech
    return replace(speech, duration=(pause + start) / 2, regions=speech.regions[:-1])


def segments_without_text(job: RecordingJob, speech: Speech) -> list[Segment]:
    """What the recording is cut into before anything is known of its text.

    Raises `ValueError` where there is nothing to cut, or too much to leave uncut.
    """
    options = job.options
    if not speech.regions:
        loudest = float(speech.power.max(initial=0.0))
        if loudest < SILENT:
            raise ValueError("is silent")
        quiet = "; it is very quiet: amplify it" if loudest < QUIET else ""
        raise ValueError(f"has no speech in it{quiet}")
    if not options.split_long:
        if speech.duration > LONGEST_UNCUT:
            raise ValueError(f"is {speech.duration:.0f} s long: cut it with --split-long")
        return [Segment(0.0, speech.duration)]
    start, end = speech.regions[0][0], speech.regions[-1][1]
    pieces = [SpeechPiece(start, end)]
    if end - start > job.longest:
        pieces = segment.speech_pieces(speech, longest=job.longest)
    return _grouped(job, pieces, 0.0, speech.duration)


def make_plan(
    job: RecordingJob,
    speech: Speech,
    segments: list[Segment],
    recogniser: Recogniser | None,
    progress: Callable[[float], Any],
) -> Plan:
    """Decide what to keep of a recording that can be cut into these segments, and with which texts.

    Raises `ValueError` where that is nothing.
    """
    transcript, transcriptions = job.recording.transcript, []
    if recogniser is not None:
        transcriptions = list(transcribe_segments(job, segments, recogniser, progress))
    if transcript is None:
        return _plan_without_script(job, speech, segments, transcriptions)
    if len(segments) == 1:
        heard = transcriptions[0].text if transcriptions else None
        return Plan([replace(segments[0], text=transcript, heard=heard)], [])
    return _plan_with_script(job, speech, segments, transcriptions)


def transcribe_segments(
    job: RecordingJob,
    segments: list[Segment],
    recogniser: Recogniser,
    progress: Callable[[float], Any] = lambda seconds: None,
) -> Iterator[Transcription]:
    """What the recogniser makes of each segment; `progress` is told the seconds that are done."""
    parts = job.cut(segments, transcribe.SAMPLE_RATE)
    for part, samples in zip(segments, parts, strict=True):
        yield recogniser.transcribe(samples)
        progress(part.end - part.start)


def skipped_entry(job: RecordingJob, part: Segment, reason: str) -> SkippedEntry:
    return {
        "source": job.recording.source,
        "start": round(part.start, 3),
        "end": round(part.end, 3),
        "reason": reason,
        **({"heard": part.heard} if part.heard else {}),
    }


def _plan_without_script(
    job: RecordingJob,
    speech: Speech,
    segments: list[Segment],
    transcriptions: list[Transcription],
) -> Plan:
    """Keep the segments that are long enough and whose text is no hallucination."""
    kept, skipped = [], []
    for part, result in zip(segments, transcriptions, strict=True):
        seconds = part.end - part.start
        reason = transcribe.hallucination_reason(result, seconds)
        if reason is None and seconds < job.options.min_duration:
            reason = f"is shorter than {job.options.min_duration} s"
        if reason is None:
            regions = [
                (start - part.start, end - part.start)
                for start, end in speech.regions
                if start < part.end and part.start < end
            ]
            unheard = round(transcribe.longest_untranscribed(result, regions, seconds), 2)
            kept.append(
                replace(part, text=result.text, no_speech=result.no_speech, unheard=unheard)
            )
        else:
            skipped.append(skipped_entry(job, replace(part, heard=result.text), reason))
    if not kept:
        raise ValueError(f"nothing in it can be used: {skipped[0]['reason']}")
    return Plan(kept, skipped)


def _plan_with_script(
    job: RecordingJob,
    speech: Speech,
    segments: list[Segment],
    transcriptions: list[Transcription],
) -> Plan:
    """Cut a long recording together with its script; speech that the script lacks is skipped."""
    script, longest = job.recording.transcript, job.longest
    uncut = segment.speech_pieces(speech, longest=longest)
    regions = [(piece.start, piece.end) for piece in uncut]
    if transcriptions:
        words = [
            replace(word, start=part.start + word.start, end=part.start + word.end)
            for part, result in zip(segments, transcriptions, strict=True)
            for word in result.words
        ]
        pieces = align.align_words(script, words, regions, longest=longest)
    else:
        pieces = align.align_lengths(script, regions)
    forced = {piece.start for piece in uncut if piece.forced}
    pieces = [replace(piece, forced=piece.start in forced) for piece in pieces]
    runs = [list(run) for _, run in groupby(pieces, key=lambda piece: is_speakable(piece.text))]
    between = (segment.middle_of_pause(one[-1], other[0]) for one, other in pairwise(runs))
    bounds = pairwise([0.0, *between, speech.duration])
    kept, skipped = [], []
    for run, (begin, end) in zip(runs, bounds, strict=True):
        if is_speakable(run[0].text):
            kept += _grouped(job, run, begin, end)
        else:
            reason = "speech that its transcript does not have"
            skipped += [
                skipped_entry(job, Segment(p.start, p.end, heard=p.heard), reason) for p in run
            ]
    return Plan(kept, skipped)


def _grouped(
    job: RecordingJob, pieces: list[SpeechPiece], begin: float, end: float
) -> list[Segment]:
    """Neighbouring pieces as segments of the wanted duration, between `begin` and `end`."""
    return segment.plan_segments(
        *(pieces, begin, end),
        target=job.options.segment_duration,
        longest=job.longest,
        shortest=job.options.min_duration,
    )
