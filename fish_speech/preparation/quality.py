"""Figures of a clip that tell whether it is fit to learn from, and the flags made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fish_speech import audio
from fish_speech.preparation.align import spoken_letters
from fish_speech.preparation.entries import ClipEntry
from fish_speech.preparation.options import Thresholds
from fish_speech.preparation.segment import FRAME_SECONDS, Segment, Speech

EDGE_SECONDS = 0.03
ABOVE_NOISE = 6.0  # dB; an edge that is lower may be noise, and no word
FULL_SCALE = 0.999  # of the highest sample: from here on, samples are at the ceiling
SLICES, BANDS = 16, 8  # of time and of frequency, in a spectral fingerprint
# Flags of what a voice would learn wrong. Clips with the others only waste a little of the data
# ("doubted": small models doubt some clips that are short and clear).
BLOCKING_FLAGS = {"too_long", "little_speech", "clipping", "clipped_start", "clipped_end"} | {
    "cut_in_speech", "breaks_off", "slow_text", "fast_text", "disagreement", "unheard",
}  # fmt: skip
MIN_SIMILARITY = 0.97  # of fingerprints; different sentences of one voice stay far below
MAX_LENGTH_DIFFERENCE = 0.03  # share of its duration by which duplicates may differ


def measure(
    samples: np.ndarray, sample_rate: int, segment: Segment, speech: Speech, *, floating: bool
) -> ClipEntry:
    """Figures of a segment's samples [N] as they came from the recording, before any levelling.

    `snr` (dB) and `speech_share` come from the frames of `speech`; `edge_start` and `edge_end` are
    the levels of the first and last 30 ms against the speech in it (dB): near 0, a cut-off word.
    `shape` is for `near_duplicates`. `floating` as in `clipping`.
    """
    low = int(segment.start / FRAME_SECONDS)
    high = max(low + 1, int(np.ceil(segment.end / FRAME_SECONDS)))
    power, spoken = speech.power[low:high], speech.probability[low:high] >= 0.5
    loud = float(power[spoken].mean()) if spoken.any() else float(power.mean())
    quiet = float(np.quantile(power, 0.05))  # pauses and closures fill as much of any speech
    edge = round(EDGE_SECONDS * sample_rate)
    return {
        "duration": round(len(samples) / sample_rate, 3),
        "speech_share": round(float(spoken.mean()), 3),
        "peak": _decibel(float(np.square(np.abs(samples).max(initial=0.0)))),
        "clipping": round(clipping(samples, floating=floating), 5),
        "snr": round(min(100.0, max(0.0, _decibel(loud) - _decibel(quiet))), 1),
        "edge_start": round(_decibel(_variance(samples[:edge])) - _decibel(loud), 1),
        "edge_end": round(_decibel(_variance(samples[-edge:])) - _decibel(loud), 1),
        "shape": spectral_fingerprint(samples, sample_rate),
    }


def spectral_fingerprint(samples: np.ndarray, sample_rate: int) -> str:
    """Energy in 16 time slices x 8 frequency bands, independent of level: 128 bytes, as hex."""
    edges = np.geomspace(100, min(8000, sample_rate / 2), BANDS + 1)
    rows = []
    for part in np.array_split(samples, SLICES):
        spectrum = np.square(np.abs(np.fft.rfft(part))) if len(part) else np.zeros(1)
        at = np.searchsorted(np.fft.rfftfreq(max(1, len(part)), 1 / sample_rate), edges)
        rows.append([spectrum[a:b].sum() for a, b in pairwise(at)])
    levels = np.log10(np.array(rows) + 1e-9)
    levels = np.clip((levels - levels.mean()) / (levels.std() + 1e-9), -4, 4)
    return np.round(levels * 31).astype(np.int8).tobytes().hex()


def near_duplicates(clips: Sequence[ClipEntry]) -> dict[int, int]:
    """Clips that sound like an earlier one of the same speaker: {index: index of the earlier}.

    The earlier one is a clip without flags: one of the two should be fit to stay.
    """
    if not clips:
        return {}
    fingerprints = [np.frombuffer(bytes.fromhex(clip["shape"]), np.int8) for clip in clips]
    vectors = np.array(fingerprints, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    durations = np.array([clip["duration"] for clip in clips])
    by_speaker = defaultdict(list)
    for index, clip in enumerate(clips):
        by_speaker[clip["speaker"]].append(index)
    found: dict[int, int] = {}
    for own in by_speaker.values():
        # Sorted by length, for only neighbours are about as long as a clip. The limits are a little
        # wide, and `close` below is exact.
        order = np.array(sorted(own, key=durations.__getitem__))
        sounds, lengths = vectors[order], durations[order]
        lows = np.searchsorted(lengths, (0.999 - MAX_LENGTH_DIFFERENCE) * durations[own])
        highs = np.searchsorted(lengths, (1.001 + MAX_LENGTH_DIFFERENCE) * durations[own])
        for index, low, high in zip(own, lows, highs, strict=True):
            near, off = order[low:high], np.abs(lengths[low:high] - durations[index])
            alike = sounds[low:high] @ vectors[index] > MIN_SIMILARITY
            close = (near < index) & (off < MAX_LENGTH_DIFFERENCE * durations[index])
            for earlier in np.sort(near[close & alike]).tolist():
                if earlier not in found and not clips[earlier].get("flags"):
                    found[index] = earlier
                    break
    return found


def clipping(samples: np.ndarray, *, floating: bool) -> float:
    """The share of samples that are, three or more in a row, at the highest level or above 1.

    (Where a wave was clipped, lossy codecs leave ragged peaks above 1.) Samples that were saved as
    floats (`floating`) may exceed 1 unharmed.
    """
    ceiling = float(np.abs(samples).max(initial=0.0))
    if ceiling < 0.1:
        return 0.0
    flat = FULL_SCALE * ceiling
    at = (np.abs(samples) >= (flat if floating else min(1.0, flat))).astype(np.int8)
    triples = at[:-2] & at[1:-1] & at[2:]
    return float(triples.sum() / len(samples)) if len(samples) > 2 else 0.0


def with_flags(clip: ClipEntry, thresholds: Thresholds, min_duration: float) -> ClipEntry:
    """The entry of a clip with what depends on its text, and its `flags`."""
    rate = characters_per_second(clip["text"], clip["duration"] * clip["speech_share"])
    clip = {**clip, "characters_per_second": rate}
    return {**clip, "flags": flags(clip, thresholds, min_duration)}


def mark_near_duplicates(clips: Sequence[ClipEntry]) -> list[ClipEntry]:
    """The entries of all clips, near-duplicates flagged, without their `shape`."""
    duplicates = near_duplicates(clips)
    marked = []
    for index, clip in enumerate(clips):
        clip = {key: value for key, value in clip.items() if key != "shape"}
        if index in duplicates:
            clip["duplicate_of"] = clips[duplicates[index]]["file"]
            clip["flags"] = [*clip["flags"], "near_duplicate"]
        marked.append(clip)
    return marked


def flags(clip: ClipEntry, thresholds: Thresholds, min_duration: float) -> list[str]:
    """What is wrong with a clip, as short words in a fixed order; `min_duration` is in seconds."""
    loudest_edge = max(thresholds.max_edge, ABOVE_NOISE - clip["snr"])
    checks = {
        "too_short": clip["duration"] < min_duration,
        "too_long": clip["duration"] > thresholds.longest,
        "little_speech": clip["speech_share"] < thresholds.min_speech,
        "noisy": clip["snr"] < thresholds.min_snr,
        "clipping": clip["clipping"] > thresholds.max_clipping,
        "clipped_start": clip["edge_start"] > loudest_edge,
        "clipped_end": clip["edge_end"] > loudest_edge,
        "cut_in_speech": clip.get("cut_in_speech", False),
        "breaks_off": clip.get("breaks_off", False),
        "slow_text": clip["characters_per_second"] < thresholds.min_rate,
        "fast_text": clip["characters_per_second"] > thresholds.max_rate,
        "disagreement": clip.get("disagreement", 0.0) > thresholds.max_disagreement,
        "doubted": clip.get("no_speech", 0.0) > thresholds.max_no_speech,
        "unheard": clip.get("unheard", 0.0) > thresholds.max_unheard,
    }
    return [flag for flag, raised in checks.items() if raised]


def characters_per_second(text: str, spoken_seconds: float) -> float:
    """Letters of `text`, as long as it takes to say, for each second of speech."""
    return round(spoken_letters(text) / max(0.1, spoken_seconds), 1)


def loudness(samples: np.ndarray, sample_rate: int) -> float:
    """Loudness in LUFS, `finite`."""
    return finite(audio.loudness(samples, sample_rate))


def finite(lufs: float) -> float:
    """A loudness with one decimal; -99.9 for silence (JSON knows no infinity)."""
    return round(max(-99.9, lufs), 1)


def _variance(samples: np.ndarray) -> float:
    return float(samples.var()) if len(samples) else 0.0


def _decibel(power: float) -> float:
    return round(10 * float(np.log10(max(power, 1e-10))), 1)
