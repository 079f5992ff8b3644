"""The entries of the JSON files of a dataset: `dataset_summary.json`, records, corrections."""

from __future__ import annotations

from functools import cache
from pathlib import PurePosixPath
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class _MeasuredClip(TypedDict):
    """What every clip of a record has."""

    file: str  # its path in the dataset, with "/"
    speaker: str
    text: str  # its transcript
    source: str  # the recording, as people know it
    start: float  # seconds of the recording
    end: float
    duration: float  # seconds of the clip
    speech_share: float  # share of the frames with speech
    peak: float  # dB of full scale, before levelling
    clipping: float  # share of clipped samples
    snr: float  # dB, speech against noise
    edge_start: float  # dB, level of the first 30 ms against the speech
    edge_end: float  # dB, level of the last 30 ms against the speech
    shape: str  # hexadecimal spectral fingerprint; in records only
    loudness: float  # LUFS, of the clip as it is written


class ClipEntry(_MeasuredClip, total=False):
    """What is known of a clip. Times are seconds, levels dB, shares from 0 to 1."""

    gain: float  # dB, by which it was levelled
    dc_offset: float  # that levelling took away, of full scale
    disagreement: float  # character error rate of `heard` against `text`, at most 1
    heard: str  # what the recogniser made of it, where there is a transcript too
    cut_in_speech: bool  # begins or ends inside speech, for want of a pause
    breaks_off: bool  # the recording ends before it should
    estimated: bool  # only its length tells that the text is said there
    no_speech: float  # the recogniser's probability that nobody speaks
    unheard: float  # most seconds of speech at a stretch without a recognised word
    characters_per_second: float  # letters of `text` for each second of speech
    flags: list[str]  # what is wrong with it; not in records
    duplicate_of: str  # file of the earlier clip that sounds like it; not in records


class _Reason(TypedDict):
    source: str
    reason: str


class SkippedEntry(_Reason, total=False):
    """What was left out: a recording, or the seconds of it from `start` to `end`."""

    start: float
    end: float
    heard: str  # what the recogniser made of it


class CorrectionEntry(TypedDict):
    """A text that was corrected by hand, an entry of `corrections.json`."""

    file: str  # of the clip, which may have been cut or named differently since
    source: str
    start: float
    end: float
    text: str
    instead_of: str  # the text that the clip was made with


def time_span(entry: ClipEntry | SkippedEntry) -> str:
    """Which seconds of its recording an entry is about, to be put behind a name; "" for all."""
    return f" {entry['start']:.1f}-{entry['end']:.1f} s" if "start" in entry else ""


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON is of an annotated type."""
    if is_typeddict(kind):
        return (
            isinstance(value, dict)
            and kind.__required_keys__ <= value.keys()
            and all(has_type(value[k], t) for k, t in type_hints(kind).items() if k in value)
        )
    if get_origin(kind) is UnionType:
        return any(has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(item, *get_args(kind)) for item in value)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, get_origin(kind) or kind)


def is_inside(file: str) -> bool:
    """Whether a path that was read from JSON stays in the dataset."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


type_hints = cache(get_type_hints)  # it compiles every annotation anew
