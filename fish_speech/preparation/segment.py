"""Where speech is in a recording, and where to cut it: at pauses, never inside a word if avoidable.

Everything here works on frames of 32 ms and decodes in blocks, so that memory stays flat however
long the recording is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fish_speech.audio import decode_blocks

VAD_RATE = 16_000  # Hz; what silero-vad was trained on
FRAME = 512  # samples at VAD_RATE that it judges at a time
FRAME_SECONDS = FRAME / VAD_RATE
MARGIN_SECONDS = 0.2  # silence kept on either side of speech
FADE_SECONDS = 0.005
STRETCH = 1.5  # a segment may exceed the wanted duration by this factor to reach a pause


@dataclass(frozen=True)
class Speech:
    """What was heard in a recording of `duration` seconds, frame by frame (32 ms).

    `probability` [F] of speech and `power` [F], the mean square of the samples; `islands` are the
    stretches of speech as (start, end) in seconds.
    """

    duration: float
    probability: np.ndarray
    power: np.ndarray
    islands: list[tuple[float, float]]


@dataclass(frozen=True)
class Segment:
    """A stretch to keep, in seconds of its recording; `cut_in_speech` where no pause was near."""

    start: float
    end: float
    text: str = ""
    cut_in_speech: bool = False
    estimated: bool = False

    @property
    def duration(self) -> float:
        return self.end - self.start


def find_speech(path: str | Path, *, max_seconds: float | None = None) -> Speech:
    """Listen to a recording with silero-vad. Raises as `fish_speech.audio.decode_blocks`."""
    probabilities, powers, count = [], [], 0
    with _single_thread():
        judge = _FrameJudge()
        for frames, fresh in _frames(decode_blocks(path, VAD_RATE, max_seconds=max_seconds)):
            probabilities.append(judge(frames))
            powers.append(np.square(frames).mean(axis=1))
            count += fresh
    if not count:
        raise ValueError("holds no audio")
    probability = np.concatenate(probabilities)
    return Speech(
        count / VAD_RATE, probability, np.concatenate(powers), find_islands(probability, count)
    )


def find_islands(probability: np.ndarray, count: int) -> list[tuple[float, float]]:
    """Stretches of speech (start, end) in seconds, from the frames of `count` samples."""
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    stretches = get_speech_timestamps_from_probs(
        probability.tolist(),
        sampling_rate=VAD_RATE,
        min_speech_duration_ms=100,
        min_silence_duration_ms=100,
        speech_pad_ms=0,
        audio_length_samples=count,
    )
    return [(part["start"] / VAD_RATE, part["end"] / VAD_RATE) for part in stretches]


def plan_segments(speech: Speech, *, target: float, shortest: float) -> list[Segment]:
    """Cut a recording into segments of about `target` seconds, at its longest fitting pauses.

    No segment exceeds `target` by more than half. Dynamic programming over the islands of speech
    weighs the lengths against the pauses; segments under `shortest` seconds are a last resort.
    """
    islands, forced = _break_long_islands(speech, STRETCH * target, shortest)
    if not islands:
        return []
    best, previous = [0.0], []
    for last in range(len(islands)):
        options = []
        for first in range(last, -1, -1):
            length = islands[last][1] - islands[first][0]
            if first < last and length > STRETCH * target:
                break
            pause = islands[first][0] - islands[first - 1][1] if first else np.inf
            inner = sum(
                max(0.0, islands[k + 1][0] - islands[k][1] - 1.0) for k in range(first, last)
            )
            options.append(
                (best[first] + _length_cost(length, target, shortest) + _cut_cost(pause) + inner,
                 first)
            )  # fmt: skip
        cost, first = min(options)
        best.append(cost)
        previous.append(first)
    groups, last = [], len(islands) - 1
    while last >= 0:
        groups.append((previous[last], last))
        last = previous[last] - 1
    return [
        _segment(speech, islands, first, last, forced) for first, last in reversed(groups)
    ]


def cut(
    path: str | Path,
    segments: Sequence[Segment],
    sample_rate: int,
    *,
    max_seconds: float | None = None,
) -> Iterator[np.ndarray]:
    """Yield the samples of each segment (in order of time), decoded once from start to end.

    Segments may not overlap. What a damaged end lacks is missing from the last segments.
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


def fade(samples: np.ndarray, sample_rate: int) -> np.ndarray:
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


def _break_long_islands(
    speech: Speech, longest: float, shortest: float
) -> tuple[list[tuple[float, float]], set[float]]:
    """Split islands over `longest` seconds where they are quietest; also the times of these cuts."""
    pieces, forced = [], set()
    smooth = np.convolve(speech.power, np.ones(3) / 3, mode="same")
    for start, end in speech.islands:
        while end - start > longest:
            low = round((start + max(shortest, longest / 3)) / FRAME_SECONDS)
            high = max(low + 1, round((start + longest) / FRAME_SECONDS))
            middle = (low + int(np.argmin(smooth[low:high])) + 0.5) * FRAME_SECONDS
            pieces.append((start, middle))
            forced.add(middle)
            start = middle
        pieces.append((start, end))
    return pieces, forced


def _segment(
    speech: Speech, islands: list[tuple[float, float]], first: int, last: int, forced: set[float]
) -> Segment:
    """The islands `first`..`last` with a margin on each side, at most to the middle of the pause."""
    start, end = islands[first][0], islands[last][1]
    before = islands[first - 1][1] if first else 0.0
    after = islands[last + 1][0] if last + 1 < len(islands) else speech.duration
    margin_before = min(MARGIN_SECONDS, (start - before) / (2 if first else 1))
    margin_after = min(MARGIN_SECONDS, (after - end) / (2 if last + 1 < len(islands) else 1))
    return Segment(
        start - margin_before,
        end + margin_after,
        cut_in_speech=start in forced or end in forced,
    )


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


class _FrameJudge:
    """silero-vad with its memory: probabilities [F] of the next frames [F, 512] of one recording."""

    def __init__(self) -> None:
        self.model = _silero()
        self.model.reset_states()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            judged = [self.model(frame[None], VAD_RATE) for frame in torch.from_numpy(frames)]
            return torch.cat(judged)[:, 0].numpy().astype(np.float32)


@lru_cache(maxsize=1)
def _silero():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its loader is torch.jit's
        from silero_vad import load_silero_vad

        return load_silero_vad()


class _single_thread:
    """Run torch on one thread: silero-vad's tiny steps are slower on more, and results vary.

    (Importing silero_vad sets that for the whole process; here it is put back.)
    """

    def __enter__(self) -> None:
        import torch

        self.threads = torch.get_num_threads()
        _silero()
        torch.set_num_threads(1)

    def __exit__(self, *_) -> None:
        import torch

        torch.set_num_threads(self.threads)
