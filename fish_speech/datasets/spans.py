"""By what a clip is known under any name: its codes, its file, its stretch of a recording."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fish_speech.datasets.clips import SUMMARY_NAME, read_codes_records
from fish_speech.files import read_json

LEARNED_FILE = "learned.json"  # of a merged model
_TO_THE_END = 1e6  # seconds
_SHARED_SECONDS = 0.3  # neighbours may share the pause between them

Span = list[Any]  # [digest, start, end] in seconds; a list, as JSON has it


def recorded_spans(data_dir: Path) -> dict[str, list[Span]]:
    """What is recorded of the clips of a dataset: which file each is, and where in which recording
    it was cut from, whose clips may be another dataset's recordings.

    Nothing of a record that is missing, or none of this version: the codes are known all the same.
    """
    spans = defaultdict(list)
    for record in read_codes_records(data_dir):
        for name, stamp in record["clips"].items():
            if isinstance(stamp, list) and len(stamp) == 3:  # earlier versions took no digest
                spans[name] = [[str(stamp[2]), 0.0, _TO_THE_END]]
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        summary = read_json(data_dir / SUMMARY_NAME)
        digests = {(r["speaker"], r["source"]): r["digest"] for r in summary["recordings"]}
        for clip in summary["clips"]:
            digest = str(digests[clip["speaker"], clip["source"]])
            span = [digest, float(clip["start"]), float(clip["end"])]
            spans[clip["file"].removesuffix(".wav")].append(span)
    return dict(spans)


def learned_by_model(model_dir: Path) -> SpanSet:
    """What a merged model says it has learned. Raises `ValueError` where its record is damaged."""
    file = model_dir / LEARNED_FILE
    if not file.is_file():
        return SpanSet()
    try:
        return SpanSet(read_json(file))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged; merge the model again, or delete the file") from error


def whole(codes: np.ndarray) -> Span:
    """The span of a clip that is known by its codes alone."""
    return [hashlib.sha256(np.ascontiguousarray(codes).tobytes()).hexdigest()[:16], 0.0, 1.0]


class SpanSet:
    """Stretches of recordings, such as those that a checkpoint has learned from."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        stretches = defaultdict(list)
        for source, start, end in spans:
            stretches[source].append((start, end))
        self._stretches = {source: _merged(parts) for source, parts in stretches.items()}

    def overlaps(self, spans: Iterable[Span]) -> bool:
        """Whether any of a clip's spans is in part among these, beyond a pause that it shares."""
        return any(self._overlaps(*span) for span in spans)

    def __or__(self, other: SpanSet) -> SpanSet:
        return SpanSet([*self, *other])

    def __bool__(self) -> bool:
        return bool(self._stretches)

    def __iter__(self) -> Iterator[Span]:
        for source, stretches in self._stretches.items():
            yield from ([source, *stretch] for stretch in stretches)

    def to_json(self) -> str:
        """As checkpoints hold it: torch reads text many times as fast as lists."""
        return json.dumps(sorted(self))

    @classmethod
    def from_json(cls, text: str) -> SpanSet:
        return cls(json.loads(text))

    def _overlaps(self, source: str, start: float, end: float) -> bool:
        margin = _margin(start, end)
        parts = self._stretches.get(source, ())
        before = bisect_right(parts, (end - margin,)) - 1  # the last that begins early enough
        return before >= 0 and parts[before][1] > start + margin


def shared(spans: dict[str, list[Span]]) -> set[str]:
    """The clips that are in part in another clip, too."""
    stretches = defaultdict(list)
    for name, known in spans.items():
        for source, start, end in known:
            stretches[source].append((start, end, name))
    found = set()
    for parts in stretches.values():
        furthest, last = 0.0, ""
        for start, end, name in sorted(parts):
            if start + _margin(start, end) < furthest:
                found |= {name, last}
            if end > furthest:
                furthest, last = end, name
    return found


def _margin(start: float, end: float) -> float:
    return min(_SHARED_SECONDS, (end - start) / 2)


def _merged(stretches: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches in order, those joined that touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
