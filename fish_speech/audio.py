"""Decode, mix down, resample and save audio: the only place that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fish_speech.audio_decoding import audio_info, channel_blocks, truncation
from fish_speech.files import atomic_path

if TYPE_CHECKING:
    import torch

SAVE_FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
_BLOCK_SECONDS = 30.0
_TARGET_LUFS, _CEILING_DBTP = -23.0, -1.0
_LARGEST_WAV = (1 << 32) - 4096  # bytes of samples, for its sizes have 32 bits
_MIN_POWER_SHARE = 0.05  # of the channels' power; one of six channels alone leaves 0.17 in the mean


def decode_blocks(
    path: str | Path,
    sample_rate: int | None = None,
    *,
    max_seconds: float | None = None,
    block_seconds: float = _BLOCK_SECONDS,
) -> Iterator[np.ndarray]:
    """Decode a file block by block, mixed down to mono and resampled: flat memory at any length.

    Yields float32 arrays [n] at `sample_rate` (Hz; the file's own where None), at most
    `max_seconds` of them. What libsndfile can't read, or not to its end, goes through PyAV, whose
    wheel carries its decoders. Where channels cancel each other, as with opposite polarity, the
    loudest is taken instead of their mean. Raises `FileNotFoundError`, or `ValueError` that
    names the file where it is no audio or damaged.
    """
    path = Path(path)
    native = audio_info(path).sample_rate
    blocks = _check_finite(path, _mono_blocks(path, block_seconds))
    if max_seconds is not None:
        blocks = _limit(blocks, round(max_seconds * native))
    if sample_rate is None or sample_rate == native:
        yield from blocks
        return
    import soxr

    resampler = soxr.ResampleStream(native, sample_rate, 1, dtype="float32", quality="VHQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def load_audio(
    path: str | Path, sample_rate: int | None = None, *, max_seconds: float | None = None
) -> tuple[torch.Tensor, int]:
    """Load a whole file as mono.

    Returns the waveform [1, N] (float32) and its sample rate in Hz: `sample_rate`, or the file's
    own where that is None. Raises as `decode_blocks`.
    """
    import torch

    blocks = list(decode_blocks(path, sample_rate, max_seconds=max_seconds))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return torch.from_numpy(samples)[None], sample_rate or audio_info(path).sample_rate


def is_whole(path: str | Path) -> bool:
    """Whether a file is audio, neither empty nor damaged nor truncated. It is decoded."""
    try:
        seconds = sum(map(len, decode_blocks(path))) / audio_info(path).sample_rate
        # An Ogg decoder may leave out up to 32 ms, which is much of a short file.
        return seconds > 0 and truncation(path, seconds + 0.05) is None
    except (ValueError, OSError):
        return False


def save_audio(
    path: str | Path, waveform: torch.Tensor | np.ndarray, sample_rate: int, *, bits: int = 16
) -> None:
    """Save a waveform [1, N] or [N] atomically, in the format of the suffix, scaled below 0 dBFS.

    Raises `ValueError` for a suffix that is not among `SAVE_FORMATS`, another shape, or samples
    that are not finite.
    """
    samples = _mono(waveform, path)
    peak = float(np.abs(samples).max(initial=0.0))
    with audio_writer(path, sample_rate, bits=bits) as write:
        write(samples / max(peak, 1.0))


@contextmanager
def audio_writer(
    path: str | Path, sample_rate: int, *, bits: int = 16
) -> Iterator[Callable[[torch.Tensor | np.ndarray], None]]:
    """Yield a function that appends a waveform [1, n] or [n] to the file, clipped at 0 dBFS.

    For audio that is saved while it is made. The file is there, whole, when the block succeeds.
    Raises `ValueError` for a suffix that is not among `SAVE_FORMATS`, another shape, or samples
    that are not finite, `OSError` where the disk is full.
    """
    import soundfile

    path = Path(path)
    file_format = save_format(path)
    subtype = f"PCM_{bits}" if file_format in ("WAV", "FLAC") else None

    def new_file(file_format: str) -> soundfile.SoundFile:
        return soundfile.SoundFile(temporary, "w", sample_rate, 1, subtype, format=file_format)

    def write(waveform: torch.Tensor | np.ndarray) -> None:
        nonlocal file
        samples = _mono(waveform, path)
        # In slices: libsndfile's Ogg encoder keeps its whole input of one call on the stack.
        for start in range(0, len(samples), 1 << 16):
            part = samples[start : start + (1 << 16)].clip(-1, 1)
            if file.format == "WAV" and (file.frames + len(part)) * bits // 8 > _LARGEST_WAV:
                # Go on as RF64: WAV with 64-bit sizes, which not every player knows.
                file.close()
                with _set_aside(temporary) as full, soundfile.SoundFile(full) as so_far:
                    file = new_file("RF64")
                    for block in so_far.blocks(1 << 20, dtype="int32"):
                        file.write(block)
            file.write(part)

    try:
        with atomic_path(path) as temporary:
            file = new_file(file_format)
            try:
                yield write
            finally:
                file.close()
    except soundfile.LibsndfileError as error:  # it doesn't tell which system error it met
        raise OSError(f"{path}: can't be written; is the disk full? ({error})") from error


@contextmanager
def _set_aside(path: Path) -> Iterator[Path]:
    """Rename the file at `path` out of the way; yield its new path, and remove it at the end."""
    aside = path.with_suffix(".full")
    path.rename(aside)
    try:
        yield aside
    finally:
        aside.unlink()


def _mono(waveform: torch.Tensor | np.ndarray, path: str | Path) -> np.ndarray:
    """The samples [N] of a waveform [1, N] or [N]. Raises `ValueError` for another shape, and for
    samples that are not finite; it names the file at `path`, which they are for."""
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim == 2 and len(samples) == 1:
        samples = samples[0]
    if samples.ndim != 1:
        raise ValueError(
            f"{path}: a waveform of the shape {list(samples.shape)}; [1, N] or [N] is saved"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: the waveform to be saved holds samples that are not finite")
    return samples


def save_format(path: str | Path) -> str:
    """The format that a file name's suffix asks for. Raises `ValueError` where it is unknown."""
    path = Path(path)
    file_format = SAVE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        known = " ".join(SAVE_FORMATS)
        raise ValueError(f"{path}: unknown audio format '{path.suffix}'; use one of {known}")
    return file_format


def resample(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample float32 audio [N] from one rate to another (Hz), band-limited (soxr, VHQ)."""
    if source_rate == target_rate:
        return samples
    import soxr

    return soxr.resample(samples, source_rate, target_rate, quality="VHQ").astype(np.float32)


@dataclass(frozen=True)
class LoudnessGain:
    """What `normalize_loudness` did.

    `offset` is the mean that was removed, `gain` was applied in dB (`limited`: less than wanted,
    because of the peaks), `loudness` is the result in LUFS (-inf for silence).
    """

    offset: float
    gain: float
    limited: bool
    loudness: float


def loudness(samples: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness (ITU-R BS.1770) of mono audio [N] in LUFS; -inf for silence."""
    import pyloudnorm

    meter = pyloudnorm.Meter(sample_rate)
    shortest = int(np.ceil(meter.block_size * sample_rate)) + 1  # one gating block
    if 0 < len(samples) < shortest:
        samples = np.resize(samples, shortest)  # repeats it: a very short clip has a level too
    if not np.any(samples):
        return float("-inf")
    return float(meter.integrated_loudness(samples.astype(np.float64)))


def true_peak(samples: np.ndarray, sample_rate: int) -> float:
    """The peak between the samples too (4 times oversampled, BS.1770 annex 2), in dBTP."""
    import soxr

    if not np.any(samples):
        return float("-inf")
    oversampled = soxr.resample(samples, sample_rate, 4 * sample_rate, quality="MQ")
    peak = max(float(np.abs(oversampled).max(initial=0.0)), float(np.abs(samples).max()))
    return 20 * float(np.log10(peak))


def normalize_loudness(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, LoudnessGain]:
    """Remove DC and bring mono audio [N] to -23 LUFS (EBU R 128) with its true peak below -1 dBTP.

    Only a gain is applied: peaks limit the gain, they are never compressed. Silence stays silence.
    """
    offset = float(samples.mean(dtype=np.float64)) if len(samples) else 0.0
    samples = _without_offset(samples, sample_rate)
    measured = loudness(samples, sample_rate)
    if not np.isfinite(measured):
        return samples, LoudnessGain(offset, 0.0, False, measured)
    wanted = _TARGET_LUFS - measured
    room = _CEILING_DBTP - true_peak(samples, sample_rate)
    gain = min(wanted, room)
    applied = LoudnessGain(offset, gain, room < wanted, measured + gain)
    return samples * np.float32(10 ** (gain / 20)), applied


def _without_offset(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """`samples` [N] without what is below 20 Hz.

    Not by subtracting the mean: a voice may have an offset that the silence around it hasn't.
    """
    from scipy.signal import butter, sosfiltfilt

    filters = butter(1, 20, "highpass", fs=sample_rate, output="sos")
    if len(samples) < 16:
        return samples
    reach = min(len(samples) - 1, sample_rate // 10)  # of the filter beyond both ends
    return sosfiltfilt(filters, samples.astype(np.float64), padlen=reach).astype(np.float32)


def _check_finite(path: Path, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        if not np.isfinite(block).all():
            raise ValueError(f"{path}: damaged audio (it holds samples that are no numbers)")
        yield block


def _limit(blocks: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return


def _mono_blocks(path: Path, block_seconds: float) -> Iterator[np.ndarray]:
    """The mean [n] of the channels; where they cancel each other, the loudest of them.

    That channel is kept as long as it sounds: another may have the opposite polarity, and a change
    would be heard in the middle of a word.
    """
    loudest = -1
    for block in channel_blocks(path, block_seconds):
        mono = block.mean(axis=1)
        powers = np.square(block).mean(axis=0)
        if np.square(mono).mean() < _MIN_POWER_SHARE * powers.mean():
            if loudest not in np.flatnonzero(powers > _MIN_POWER_SHARE * powers.max()):
                loudest = int(powers.argmax())
            mono = block[:, loudest].copy()
        yield mono
