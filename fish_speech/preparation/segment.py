"""Where speech is in a recording, and where to cut it: at pauses, inside a word only if it must be.

Everything here works on frames of 32 ms and decodes in blocks, so that memory stays flat however
long the recording is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from fish_speech.audio import decode_blocks

VAD_RATE = 16_000  # Hz; what silero-vad was trained on
FRAME = 512  # samples at VAD_RATE for which it gives one probability
FRAME_SECONDS = FRAME / VAD_RATE
MARGIN_SECONDS = 0.2  # silence kept on either side of speech
EXTENSION_SECONDS = 0.3  # a region is extended by at most this much on either side
FADE_SECONDS = 0.005
STRETCH = 1.5  # a segment may exceed the wanted duration by this factor to reach a pause

Region = tuple[float, float]  # of speech: its start and end in seconds


@dataclass(frozen=True)
class Speech:
    """Where speech is in a recording of `duration` seconds; F frames of 32 ms.

    `probability` [F] of speech and `power` [F], which is the variance of the samples: a DC offset
    is no sound.
    """

    duration: float
    probability: np.ndarray
    power: np.ndarray
    regions: list[Region]


@dataclass(frozen=True)
class SpeechPiece:
    """A stretch of speech that is not cut, in seconds, and what is said in it.

    `text` is a slice of the script with its white space, `heard` what a recogniser made of it
    (None: there was no recogniser). `forced`: it begins or ends inside speech, for want of a pause.
    `estimated`: only its length tells that the text is said there.
    """

    start: float
    end: float
    text: str = ""
    heard: str | None = None
    forced: bool = False
    estimated: bool = False


@dataclass(frozen=True)
class Segment:
    """A stretch to keep as one clip, in seconds of its recording, silence at its ends included.

    Of a text that was recognised: the probability (`no_speech`, 0..1) that nobody speaks, and the
    most seconds of speech at a stretch without a recognised word (`unheard`).
    """

    start: float
    end: float
    text: str = ""
    heard: str | None = None
    cut_in_speech: bool = False
    estimated: bool = False
    no_speech: float = 0.0
    unheard: float = 0.0


def find_speech(path: str | Path, *, max_seconds: float | None = None) -> Speech:
    """Run silero-vad over a recording. Raises as `fish_speech.audio.decode_blocks`."""
    probabilities, powers, count = [], [], 0
    with _silero_on_one_thread() as model:
        model.reset_states()
        for frames, new in _frames(decode_blocks(path, VAD_RATE, max_seconds=max_seconds)):
            probabilities.append(_speech_probabilities(model, frames))
            powers.append(frames[:, :new].var(axis=1))  # without the padding of the last one
            count += new
    if not count:
        raise ValueError("holds no audio")
    probability, power = np.concatenate(probabilities), np.concatenate(powers)
    regions = _extend_regions(speech_regions(probability, count), power, count / VAD_RATE)
    return Speech(count / VAD_RATE, probability, power, regions)


def speech_regions(probability: np.ndarray, count: int) -> list[Region]:
    """The regions that `probability` [F] makes speech, in a recording of `count` samples."""
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    found = get_speech_timestamps_from_probs(
        probability.tolist(),
        sampling_rate=VAD_RATE,
        min_speech_duration_ms=100,
        min_silence_duration_ms=100,
        speech_pad_ms=0,
        audio_length_samples=count,
    )
    return [(part["start"] / VAD_RATE, part["end"] / VAD_RATE) for part in found]


def speech_pieces(speech: Speech, *, longest: float) -> list[SpeechPiece]:
    """The regions as pieces; those over `longest` seconds are split where they are quietest."""
    pieces = []
    smooth = np.convolve(speech.power, np.ones(3) / 3, mode="same")
    for start, end in speech.regions:
        forced = False
        while end - start > longest:
            low = round((start + longest / 3) / FRAME_SECONDS)
            high = round((start + longest) / FRAME_SECONDS)
            middle = (low + int(np.argmin(smooth[low:high])) + 0.5) * FRAME_SECONDS
            pieces.append(SpeechPiece(start, middle, forced=True))
            start, forced = middle, True
        pieces.append(SpeechPiece(start, end, forced=forced))
    return pieces


def plan_segments(
    pieces: Sequence[SpeechPiece],
    begin: float,
    end: float,
    *,
    target: float,
    longest: float,
    shortest: float,
) -> list[Segment]:
    """Group neighbouring pieces into segments of about `target` seconds.

    Without its margins, a segment exceeds `longest` only where a single piece does. Dynamic
    programming weighs the lengths against the pauses, so that cuts fall into the longest fitting
    ones; segments under `shortest` seconds are a last resort. No margin goes beyond `begin` or
    `end`: there the recording ends, or speech begins that is left out.
    """
    best, first_of = [0.0], []
    for last in range(len(pieces)):
        options, inner = [], 0.0
        for first in range(last, -1, -1):
            length = pieces[last].end - pieces[first].start
            if first < last:
                if length > longest:
                    break
                inner += max(0.0, pieces[first + 1].start - pieces[first].end - 1.0)
            pause = pieces[first].start - pieces[first - 1].end if first else np.inf
            cost = best[first] + inner + _length_cost(length, target, shortest) + _cut_cost(pause)
            options.append((cost, first))
        cost, first = min(options)
        best.append(cost)
        first_of.append(first)
    groups, last = [], len(pieces) - 1
    while last >= 0:
        groups.append((first_of[last], last))
        last = first_of[last] - 1
    bounds = [begin, *(middle_of_pause(a, b) for a, b in pairwise(pieces)), end]
    return [_segment(pieces, first, last, bounds) for first, last in reversed(groups)]


def cut(
    path: str | Path,
    segments: Sequence[Segment],
    sample_rate: int,
    *,
    max_seconds: float | None = None,
) -> Iterator[np.ndarray]:
    """Yield the samples [N] of each segment (in order of time), decoded once from start to end.

    Segments may not overlap. The last one is shorter where the recording ends before it.
    """
    wanted = [(round(s.start * sample_rate), round(s.end * sample_rate)) for s in segments]
    kept: list[np.ndarray] = []
    position = index = 0
    for block in decode_blocks(path, sample_rate, max_seconds=max_seconds):
        end = position + len(block)
        while index < len(wanted) and wanted[index][0] < end:
            start, stop = wanted[index]
            kept.append(block[max(0, start - position) : max(0, stop - position)])
            if stop > end:
                break
            yield np.concatenate(kept)
            kept, index = [], index + 1
        position = end
        if index == len(wanted):
            return
    if kept:
        yield np.concatenate(kept)


def fade_edges(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """A copy of `samples` [N] with its first and last 5 ms faded, so that no cut clicks."""
    count = min(round(FADE_SECONDS * sample_rate), len(samples) // 2)
    ramp = np.sin(np.linspace(0, np.pi / 2, count, dtype=np.float32)) ** 2
    samples = samples.copy()
    samples[:count] *= ramp
    samples[len(samples) - count :] *= ramp[::-1]
    return samples


def _length_cost(length: float, target: float, shortest: float) -> float:
    cost = ((target - length) / target) ** 2 * (1 if length < target else 9)
    return cost + (10.0 if length < shortest else 0.0)


def _cut_cost(pause: float) -> float:
    """A pause of half a second costs nothing, a shorter one the more."""
    return 0.5 * max(0.0, 1 - pause / 0.5)


def middle_of_pause(before: SpeechPiece, after: SpeechPiece) -> float:
    """The middle of the pause between two pieces, in seconds."""
    return (before.end + after.start) / 2


def _segment(pieces: Sequence[SpeechPiece], first: int, last: int, bounds: list[float]) -> Segment:
    """The pieces `first`..`last` with a margin on each side, at most to the middle of the pause."""
    group = pieces[first : last + 1]
    heard = [piece.heard for piece in group]
    return Segment(
        max(bounds[first], group[0].start - MARGIN_SECONDS),
        min(bounds[last + 1], group[-1].end + MARGIN_SECONDS),
        "".join(piece.text for piece in group).strip(),
        None if None in heard else " ".join(words for words in heard if words),
        (group[0].forced and first > 0 and pieces[first - 1].end == group[0].start)
        or (last + 1 < len(pieces) and pieces[last + 1].start == group[-1].end),
        len(group) < len(pieces) and any(piece.estimated for piece in group),
    )


def _extend_regions(regions: list[Region], power: np.ndarray, duration: float) -> list[Region]:
    """Extend regions over the sound around them: the VAD is late for soft and sudden onsets.

    A frame belongs to a region where it is within 30 dB of its level and well above the noise.
    """
    noise = float(np.quantile(power, 0.05))
    extended = []
    most = round(EXTENSION_SECONDS / FRAME_SECONDS)
    for index, (start, end) in enumerate(regions):
        first, stop = int(start / FRAME_SECONDS), int(np.ceil(end / FRAME_SECONDS))
        floor = max(1e-3 * float(power[first:stop].mean()), 4 * noise)
        before = extended[-1][1] if extended else 0.0
        after = regions[index + 1][0] if index + 1 < len(regions) else duration
        for _ in range(most):
            if first == 0 or power[first - 1] < floor or (first - 1) * FRAME_SECONDS < before:
                break
            first -= 1
        for _ in range(most):
            if stop >= len(power) or power[stop] < floor or (stop + 1) * FRAME_SECONDS > after:
                break
            stop += 1
        start, end = min(start, first * FRAME_SECONDS), max(end, stop * FRAME_SECONDS)
        extended.append((max(start, before), min(end, after)))
    return extended


def _frames(blocks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Regroup blocks into whole frames [F, 512], and how many samples of them are new.

    The last frame is filled up with zeros.
    """
    rest = np.zeros(0, np.float32)
    for block in blocks:
        joined = np.concatenate([rest, block])
        whole = len(joined) // FRAME * FRAME
        rest = joined[whole:]
        if whole:
            yield joined[:whole].reshape(-1, FRAME), whole
    if len(rest):
        yield np.pad(rest, (0, FRAME - len(rest)))[None], len(rest)


def _speech_probabilities(model, frames: np.ndarray) -> np.ndarray:
    """The probabilities [F] of the next frames [F, 512]; the model keeps state between calls."""
    import torch

    with torch.inference_mode():
        probabilities = [model(frame[None], VAD_RATE) for frame in torch.from_numpy(frames)]
        return torch.cat(probabilities)[:, 0].numpy()


@contextmanager
def _silero_on_one_thread() -> Iterator:
    """silero-vad's model, with torch on one thread: a frame is too little work to share.

    Importing silero_vad leaves torch on one thread for good; here the number is put back.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        model = _silero()
        torch.set_num_threads(1)
        yield model
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _silero():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is loaded through torch.jit
        from silero_vad import load_silero_vad

        return load_silero_vad()
