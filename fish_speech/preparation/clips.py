"""One recording becomes clips: listen, decide what to keep with which text, cut, measure, write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fish_speech.audio import normalize_loudness, resample, save_audio
from fish_speech.audio_decoding import AudioInfo, audio_info, truncation
from fish_speech.files import read_text, sidecar_of, write_text
from fish_speech.preparation import align, quality, rates, segment, sources, transcribe
from fish_speech.preparation.segment import Piece, Segment, Speech
from fish_speech.preparation.sources import Recording
from fish_speech.preparation.summary import FRESH, Record
from fish_speech.text import is_speakable

if TYPE_CHECKING:
    from fish_speech.preparation.pipeline import Options

SAMPLE_RATE = 44_100  # of the codec, and so of every clip
LONGEST_UNCUT = (
    120.0  # seconds; more than this is no utterance, and wouldn't fit in memory at hours
)
ENOUGH_CLIPS = 12  # of a recording, to tell its language by
TOUCHES_SECONDS = 0.1  # before the end of what is used, in which the VAD sees no pause
SILENT, QUIET = 1e-8, 1e-5  # power: below these nothing, or no speech, can be heard
VERSION = 6  # raise it where the same options make other clips: old ones are then made anew


@dataclass(frozen=True)
class Job:
    """One recording, how it is to be prepared, and the identity of the recogniser that helps."""

    recording: Recording
    options: Options
    recogniser: str | None = None

    @property
    def recipe(self) -> str:
        """A digest of all that the recording's clips depend on."""
        options, recording = self.options, self.recording
        ingredients = [
            VERSION, recording.digest, recording.transcript, recording.problem, self.recogniser,
            options.normalize, options.max_duration, options.min_duration,
            (options.segment_duration, self.longest) if options.split_long else None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]

    @property
    def max_seconds(self) -> float | None:
        minutes = self.options.max_duration
        return None if minutes is None else minutes * 60

    @property
    def longest(self) -> float:
        """Seconds that speech may last without being cut."""
        options = self.options
        if not options.split_long:
            return LONGEST_UNCUT
        fitting = options.thresholds.longest - 2 * segment.MARGIN_SECONDS  # not to be flagged
        return max(options.min_duration, min(segment.STRETCH * options.segment_duration, fitting))

    @property
    def seconds(self) -> float:
        """About how long the recording is, as far as it is used; 0 where it can't be read."""
        try:
            duration = audio_info(self.recording.path).duration or 0.0
        except (ValueError, OSError):
            return 0.0
        return min(duration, self.max_seconds or duration)


@dataclass(frozen=True)
class Plan:
    """What to keep of a recording and what not (entries of the summary's `skipped`)."""

    segments: list[Segment]
    skipped: list[dict[str, Any]]


def carry_out(
    job: Job,
    recogniser: transcribe.Journal | None = None,
    progress: Callable[[float], Any] = lambda seconds: None,
) -> Record:
    """Prepare one recording: its clips are written under `FRESH`, its record is returned.

    A recording that can't be used comes back as a record with a `failure`, whatever the reason.
    Raises `OSError` only where the output can't be written.
    """
    recording = job.recording
    record = _record_of(job, job.recipe)
    try:
        if recording.problem:
            raise ValueError(recording.problem)
        if recording.transcript is None and recogniser is None:
            beside = f"put one beside it ({recording.path.stem}.txt) or "
            raise ValueError(
                f"has no transcript: {'' if recording.origin else beside}use --auto-transcribe"
            )
        speech = _listen(job)
        record.duration = round(speech.duration, 3)
        missing = _missing(job, speech)
        cut_off = _ends_in_speech(job, speech)
        used = _without_its_last_words(job, speech) if cut_off else speech
        segments = _segments(job, used)
        if recogniser is not None:
            recogniser = recogniser.for_language_of(_decoded(job, segments[:ENOUGH_CLIPS]))
            record.language = recogniser.language
        plan = make_plan(job, used, segments, recogniser, progress)
        record.skipped = plan.skipped
        record.clips = list(write_clips(job, plan, used))
        if used is not speech:
            rest = Segment(used.duration, speech.duration)
            record.skipped.append(_skip(job, rest, "--max-duration ends in it"))
        elif cut_off and record.clips[-1]["end"] > speech.islands[-1][0]:
            record.clips[-1]["cut_in_speech"] = True
        if missing:
            record.clips[-1]["breaks_off"] = True
            reason = f"{missing}; what is there is used"
            record.skipped.append({"source": recording.source, "reason": reason})
    except OSError:
        raise
    except Exception as error:
        record.failure = _reason(error, recording)
        record.duration = record.duration or round(job.seconds, 3)
        record.skipped, record.clips = [], []
    return record


def _record_of(job: Job, recipe: str) -> Record:
    """A record of the job's recording, in which nothing is noted yet."""
    recording = job.recording
    return Record(
        recording.speaker, recording.name, recording.source, recording.address, recording.digest,
        recipe, origin=recording.origin, scripted=recording.transcript is not None,
        encoding=recording.encoding,
    )  # fmt: skip


def _listen(job: Job, max_seconds: float | None = None) -> Speech:
    """Find the speech in a job's recording. Raises `ValueError` where it can't be read."""
    try:
        return segment.find_speech(job.recording.path, max_seconds=max_seconds or job.max_seconds)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


def _missing(job: Job, speech: Speech) -> str | None:
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


def _ends_in_speech(job: Job, speech: Speech) -> bool:
    """Whether `--max-duration` ends where somebody speaks on."""
    limit = job.max_seconds
    if limit is None or not speech.islands or speech.islands[-1][1] < limit - TOUCHES_SECONDS:
        return False
    length = audio_info(job.recording.path).duration
    return length is None or length > limit + TOUCHES_SECONDS


def _without_its_last_words(job: Job, speech: Speech) -> Speech:
    """`speech` up to its last pause, unless a script has them or they are more than a clip."""
    if job.recording.transcript is not None or len(speech.islands) < 2:
        return speech
    (_, pause), (start, end) = speech.islands[-2:]
    if end - start > job.longest:
        return speech
    return replace(speech, duration=(pause + start) / 2, islands=speech.islands[:-1])


def make_plan(
    job: Job,
    speech: Speech,
    segments: list[Segment],
    recogniser: transcribe.Recogniser | None,
    progress: Callable[[float], Any],
) -> Plan:
    """Decide what to keep of a recording that can be cut into these segments, and with which texts.

    Raises `ValueError` where that is nothing.
    """
    options, transcript = job.options, job.recording.transcript
    heard = []
    if recogniser is not None:
        heard = list(_hear(job, segments, recogniser, progress))
    if transcript is None:
        return _recognised(job, speech, segments, heard)
    if len(segments) == 1:
        return Plan(
            [replace(segments[0], text=transcript, heard=heard[0].text if heard else None)], []
        )
    uncut = segment.speech_pieces(speech, longest=job.longest)
    islands = [(piece.start, piece.end) for piece in uncut]
    if heard:
        words = [
            replace(word, start=part.start + word.start, end=part.start + word.end)
            for part, result in zip(segments, heard, strict=True)
            for word in result.words
        ]
        pieces = align.align_words(transcript, words, islands, longest=job.longest)
    else:
        pieces = align.align_lengths(transcript, islands)
    forced = {piece.start for piece in uncut if piece.forced}
    pieces = [replace(piece, forced=piece.start in forced) for piece in pieces]
    runs = [list(run) for _, run in groupby(pieces, key=lambda piece: is_speakable(piece.text))]
    between = (segment.middle(one[-1], other[0]) for one, other in pairwise(runs))
    bounds = pairwise([0.0, *between, speech.duration])
    segments, skipped = [], []
    for run, (begin, end) in zip(runs, bounds, strict=True):
        if is_speakable(run[0].text):
            segments += segment.plan_segments(
                *(run, begin, end),
                target=options.segment_duration, longest=job.longest, shortest=options.min_duration,
            )  # fmt: skip
        else:
            reason = "speech that its transcript does not have"
            skipped += [_skip(job, Segment(p.start, p.end, heard=p.heard), reason) for p in run]
    return Plan(segments, skipped)


def write_clips(job: Job, plan: Plan, speech: Speech) -> Iterator[dict[str, Any]]:
    """Cut the segments out of the recording, write each as a clip and yield its summary entry."""
    recording, options = job.recording, job.options
    info = audio_info(recording.path)
    parts = _decoded(job, plan.segments, info.sample_rate)
    for number, (part, samples) in enumerate(zip(plan.segments, parts, strict=True), 1):
        file = f"{recording.speaker}/{recording.name}_{number:04d}.wav"
        clip = describe(file, recording, part, samples, info, speech)
        samples = resample(samples, info.sample_rate, SAMPLE_RATE)
        if options.normalize:
            samples, leveling = normalize_loudness(samples, SAMPLE_RATE)
            clip["loudness"] = quality.finite(leveling.loudness)
            clip["gain"], clip["dc_offset"] = round(leveling.gain, 1), round(leveling.offset, 4)
        else:
            clip["loudness"] = quality.loudness(samples, SAMPLE_RATE)
        samples = segment.fade(samples, SAMPLE_RATE) if options.split_long else samples
        path = Path(options.output, FRESH, file)
        save_audio(path, samples, SAMPLE_RATE)
        write_text(path.with_suffix(".lab"), part.text)
        yield clip


def inspect(job: Job, recogniser: transcribe.Recogniser | None = None) -> Record:
    """Look at a clip of a data set as it is, writing nothing: its entry, or why it has none."""
    recording = job.recording
    record = _record_of(job, "")
    try:
        if recording.problem:
            raise ValueError(recording.problem)
        label = recording.path.with_suffix(".lab")
        if not label.is_file():
            other = sidecar_of(recording.path)
            there = f", only {other.name}: prepare it, with --input" if other else ""
            raise ValueError(f"has no transcript {label.name}{there}")
        text = sources.fold(read_text(label))  # as training reads it: in UTF-8 only
        speech = _listen(job, LONGEST_UNCUT)
        whole = Segment(0.0, speech.duration, text)
        if recogniser is not None:
            heard = next(_hear(job, [whole], recogniser, lambda seconds: None))
            whole = replace(whole, heard=heard.text)
        info = audio_info(recording.path)
        samples = next(segment.cut(recording.path, [whole], info.sample_rate))
        file = sources.printable(recording.path.relative_to(job.options.input).as_posix())
        clip = describe(file, recording, whole, samples, info, speech)
        record.clips = [{**clip, "loudness": quality.loudness(samples, info.sample_rate)}]
        if speech.duration < LONGEST_UNCUT and truncation(recording.path, speech.duration):
            record.clips[0]["breaks_off"] = True
    except Exception as error:
        record.failure = _reason(error, recording)
    return record


def describe(
    file: str,
    recording: Recording,
    part: Segment,
    samples: np.ndarray,
    info: AudioInfo,
    speech: Speech,
) -> dict[str, Any]:
    """The summary entry of a clip, from its samples [N] as they are in the recording.

    (Resampling would hide clipping: it rounds the flat tops.)
    """
    clip = {
        "file": file,
        "speaker": recording.speaker,
        "text": part.text,
        "source": recording.source,
        "start": round(part.start, 3),
        "end": round(part.end, 3),
        **quality.measure(samples, info.sample_rate, part, speech, floating=info.floating),
    }
    if recording.transcript is not None and part.heard is not None:
        clip["disagreement"] = rates.disagreement(part.text, part.heard)
        clip["heard"] = part.heard
    for name in ("cut_in_speech", "estimated", "no_speech", "unheard"):
        if value := getattr(part, name):
            clip[name] = value
    return clip


def _segments(job: Job, speech: Speech) -> list[Segment]:
    """What the recording is cut into before anything is known of its text.

    Raises `ValueError` where there is nothing to cut, or too much to leave uncut.
    """
    options = job.options
    if not speech.islands:
        loudest = float(speech.power.max(initial=0.0))
        if loudest < SILENT:
            raise ValueError("is silent")
        quiet = "; it is very quiet: amplify it" if loudest < QUIET else ""
        raise ValueError(f"has no speech in it{quiet}")
    if not options.split_long:
        if speech.duration > LONGEST_UNCUT:
            raise ValueError(f"is {speech.duration:.0f} s long: cut it with --split-long")
        return [Segment(0.0, speech.duration)]
    start, end = speech.islands[0][0], speech.islands[-1][1]
    pieces = [Piece(start, end)]
    if end - start > job.longest:
        pieces = segment.speech_pieces(speech, longest=job.longest)
    return segment.plan_segments(
        *(pieces, 0.0, speech.duration),
        target=options.segment_duration,
        longest=job.longest,
        shortest=options.min_duration,
    )


def _decoded(
    job: Job, segments: list[Segment], sample_rate: int = transcribe.SAMPLE_RATE
) -> Iterator[np.ndarray]:
    """The samples [N] of each segment."""
    return segment.cut(job.recording.path, segments, sample_rate, max_seconds=job.max_seconds)


def _hear(
    job: Job,
    segments: list[Segment],
    recogniser: transcribe.Recogniser,
    progress: Callable[[float], Any],
) -> Iterator[transcribe.Heard]:
    for part, samples in zip(segments, _decoded(job, segments), strict=True):
        yield recogniser.hear(samples)
        progress(part.end - part.start)


def _recognised(
    job: Job, speech: Speech, segments: list[Segment], heard: list[transcribe.Heard]
) -> Plan:
    """Keep the segments that are long enough and whose text was not made up."""
    kept, skipped = [], []
    for part, result in zip(segments, heard, strict=True):
        seconds = part.end - part.start
        reason = transcribe.made_up(result, seconds)
        if reason is None and seconds < job.options.min_duration:
            reason = f"is shorter than {job.options.min_duration} s"
        if reason is None:
            islands = [
                (start - part.start, end - part.start)
                for start, end in speech.islands
                if start < part.end and part.start < end
            ]
            unheard = round(transcribe.unheard(result, islands, seconds), 2)
            kept.append(
                replace(part, text=result.text, no_speech=result.no_speech, unheard=unheard)
            )
        else:
            skipped.append(_skip(job, replace(part, heard=result.text), reason))
    if not kept:
        raise ValueError(f"nothing in it can be used: {skipped[0]['reason']}")
    return Plan(kept, skipped)


def _reason(error: Exception, recording: Recording) -> str:
    """Why a recording can't be used, on one line."""
    line = sources.first_line(error, recording.path)
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def _skip(job: Job, part: Segment, reason: str) -> dict[str, Any]:
    return {
        "source": job.recording.source,
        "start": round(part.start, 3),
        "end": round(part.end, 3),
        "reason": reason,
        **({"heard": part.heard} if part.heard else {}),
    }
