"""Decode, mix down, resample and save audio: the only place that does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fish_speech.files import atomic_path

if TYPE_CHECKING:
    import torch

SAVE_FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
_BLOCK_SECONDS = 30.0
CANCELLED = 0.05  # share of the channels' power in their mean; one of six that sounds has 0.17


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds: `sample_rate` in Hz, `channels`, `duration` in seconds where known.

    `floating`: its samples are floats as they were saved, which may be above 1 without being
    clipped.
    """

    sample_rate: int
    channels: int
    duration: float | None
    floating: bool = False


def audio_info(path: str | Path) -> AudioInfo:
    """Read a file's header. Raises `FileNotFoundError`, or `ValueError` where it is no audio."""
    path = _existing(path)
    if (info := _sndfile_info(path)) is not None:
        floating = info.subtype in ("FLOAT", "DOUBLE")
        return AudioInfo(info.samplerate, info.channels, info.frames / info.samplerate, floating)
    with _open_av(path) as container:
        stream = container.streams.audio[0]
        if container.format.name == "mp3" and not _mp3_states_its_length(path):
            duration = None
        elif stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        elif container.duration is not None and not container.streams.video:  # a picture may last
            duration = container.duration / 1e6  # in AV_TIME_BASE, microseconds
        else:
            duration = None
        if not stream.rate:
            raise ValueError(f"{path}: not an audio file that can be decoded (no sample rate)")
        floating = stream.codec.name.startswith("pcm_f")
        return AudioInfo(stream.rate, stream.channels, duration, floating)


def breaks_off(path: str | Path, seconds: float) -> str | None:
    """How a file that gave `seconds` of audio is not whole, as words for people; None if it is."""
    path = _existing(path)
    promised = max(audio_info(path).duration or 0.0, seconds / _share_of_chunk(path))
    if seconds < 0.97 * promised:
        return f"breaks off after {seconds:.1f} of {promised:.1f} s"
    return None if _ogg_has_an_end(path) else f"breaks off after {seconds:.1f} s"


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
    wheel carries its decoders. Where channels cancel each other, as with a wire's poles swapped,
    the loudest is taken instead of their mean. Raises `FileNotFoundError`, or `ValueError` that
    names the file where it is no audio or damaged.
    """
    path = _existing(path)
    native = audio_info(path).sample_rate
    blocks = _finite(path, _mono_blocks(path, block_seconds))
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


def save_audio(
    path: str | Path, waveform: torch.Tensor | np.ndarray, sample_rate: int, *, bits: int = 16
) -> None:
    """Save a waveform [1, N] or [N] atomically, in the format of the suffix, scaled below 0 dBFS.

    Raises `ValueError` for a suffix that is not among `SAVE_FORMATS`.
    """
    samples = np.asarray(waveform, dtype=np.float32).reshape(-1)
    peak = float(np.abs(samples).max(initial=0.0))
    with audio_writer(path, sample_rate, bits=bits) as write:
        write(samples / max(peak, 1.0))


@contextmanager
def audio_writer(
    path: str | Path, sample_rate: int, *, bits: int = 16
) -> Iterator[Callable[[torch.Tensor | np.ndarray], None]]:
    """Yield a function that appends a waveform [1, n] or [n] to the file, clipped at 0 dBFS.

    For audio that is saved while it is made. The file is there, whole, when the block succeeds.
    Raises `ValueError` for a suffix that is not among `SAVE_FORMATS`, `OSError` where the disk is
    full.
    """
    import soundfile

    path = Path(path)
    file_format = save_format(path)
    subtype = f"PCM_{bits}" if file_format in ("WAV", "FLAC") else None

    def write(waveform: torch.Tensor | np.ndarray) -> None:
        samples = np.asarray(waveform, dtype=np.float32).reshape(-1)
        # In slices: libsndfile's Ogg encoder keeps its whole input of one call on the stack.
        for start in range(0, len(samples), 1 << 16):
            file.write(samples[start : start + (1 << 16)].clip(-1, 1))

    try:
        with (
            atomic_path(path) as temporary,
            soundfile.SoundFile(
                temporary, "w", sample_rate, 1, subtype, format=file_format
            ) as file,
        ):
            yield write
    except soundfile.LibsndfileError as error:  # it doesn't tell which system error it met
        raise OSError(f"{path}: can't be written; is the disk full? ({error})") from error


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
class Leveling:
    """What `level` did.

    It removed an `offset` of that mean and gave a `gain` in dB (`limited`: less than wanted, for
    the peaks), which made a `loudness` in LUFS (-inf for silence).
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
        samples = np.resize(samples, shortest)  # repeats it, so that a very short clip has a level
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


def level(
    samples: np.ndarray, sample_rate: int, *, target: float = -23.0, ceiling: float = -1.0
) -> tuple[np.ndarray, Leveling]:
    """Remove DC and bring mono audio [N] to `target` LUFS with its true peak below `ceiling` dBTP.

    Only a gain is applied: where peaks are in the way it is held back, never the wave bent.
    Silence stays silence.
    """
    offset = float(samples.mean(dtype=np.float64)) if len(samples) else 0.0
    samples = _without_offset(samples, sample_rate)
    measured = loudness(samples, sample_rate)
    if not np.isfinite(measured):
        return samples, Leveling(offset, 0.0, False, measured)
    wanted, room = target - measured, ceiling - true_peak(samples, sample_rate)
    gain = min(wanted, room)
    done = Leveling(offset, gain, room < wanted, measured + gain)
    return samples * np.float32(10 ** (gain / 20)), done


def _without_offset(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """`samples` [N] without what is below 20 Hz.

    A voice may have an offset where silence has none; subtracting the mean would give silence one.
    """
    from scipy.signal import butter, sosfiltfilt

    filters = butter(1, 20, "highpass", fs=sample_rate, output="sos")
    if len(samples) < 16:
        return samples
    reach = min(len(samples) - 1, sample_rate // 10)  # of the filter beyond both ends
    return sosfiltfilt(filters, samples.astype(np.float64), padlen=reach).astype(np.float32)


def _share_of_chunk(path: Path) -> float:
    """How much of its samples' chunk a WAV or AIFF file has; 1 for other files."""
    with path.open("rb") as file:
        kind, order = {b"RIFF": (b"data", "little"), b"RIFX": (b"data", "big"),
                       b"FORM": (b"SSND", "big")}.get(file.read(4), (None, ""))  # fmt: skip
        file.seek(12)
        while kind is not None and len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], order)
            if head[:4] == kind:
                there = path.stat().st_size - file.tell()
                # Programs that write to a pipe don't know the size, and write 0 or a huge one.
                unknown = size == 0 or size >= 0x7FFFF000 > there
                return 1.0 if unknown else max(1e-3, min(1.0, there / size))
            file.seek(size + size % 2, 1)
    return 1.0


def _ogg_has_an_end(path: Path) -> bool:
    """Whether a file is no Ogg, or has the page that says that it is the last."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return True
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # two pages are never larger
        tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and len(tail) > last + 27 and bool(tail[last + 5] & 4)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return path


def _finite(path: Path, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
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


def _native(path: Path) -> str | bytes:
    """`path` as C code takes it, whatever bytes its name is made of."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def _sndfile_info(path: Path) -> Any:
    """What libsndfile reads of a header; None where PyAV has to read the file.

    libsndfile stops where the length that it read or estimated ends: after the first of several
    MP3 or Ogg streams in a file, or somewhere in an MP3 that states none.
    """
    import soundfile

    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"OggS", b"ID3")) or head[:2] >= b"\xff\xe0":  # a frame of MP3
        return None  # where libsndfile would warn about lengths on standard error
    try:
        info = soundfile.info(_native(path))
    except soundfile.LibsndfileError:
        return None
    return info if info.format not in ("MP3", "OGG") and 0 < info.frames < 1 << 62 else None


def _mp3_states_its_length(path: Path) -> bool:
    """Whether an MP3 begins with a frame that counts the others; else its length is a guess."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            file.seek(10 + sum((byte & 127) << shift for byte, shift in
                               zip(head[6:], (21, 14, 7, 0), strict=False)))  # fmt: skip
            head = b""
        head += file.read(1 << 12)
    return any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))


def _mono_blocks(path: Path, block_seconds: float) -> Iterator[np.ndarray]:
    """The mean [n] of the channels; where they cancel each other, the loudest of them.

    That one for as long as it sounds: another's poles may be swapped, in mid-word.
    """
    loudest = -1
    read = _blocks_av if _sndfile_info(path) is None else _blocks_sndfile
    for block in read(path, block_seconds):
        mono = block.mean(axis=1)
        powers = np.square(block).mean(axis=0)
        if np.square(mono).mean() < CANCELLED * powers.mean():
            if loudest not in np.flatnonzero(powers > CANCELLED * powers.max()):
                loudest = int(powers.argmax())
            mono = block[:, loudest].copy()
        yield mono


def _blocks_sndfile(path: Path, block_seconds: float) -> Iterator[np.ndarray]:
    """Blocks [n, C] of that many seconds, the last one shorter."""
    import soundfile

    with soundfile.SoundFile(_native(path)) as file:
        frames = max(1, round(block_seconds * file.samplerate))
        try:
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                yield block
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: damaged audio ({error})") from error


def _open_av(path: Path):
    import av

    try:
        container = av.open(str(path.absolute()))  # a bare "10:30.m4a" would be a protocol
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(
            f"{path}: not an audio file that can be decoded ({_said(error)})"
        ) from error
    if not container.streams.audio:
        container.close()
        raise ValueError(f"{path}: the file has no audio track")
    return container


def _blocks_av(path: Path, block_seconds: float) -> Iterator[np.ndarray]:
    """Blocks [n, C] of at least that many seconds; shorter before C changes, and at the end."""
    import av

    with _open_av(path) as container:
        stream = container.streams.audio[0]
        enough = block_seconds * stream.rate
        parts: list[np.ndarray] = []
        count = 0
        try:
            for part in _floats_av(container, stream):
                if parts and (count >= enough or part.shape[1] != parts[0].shape[1]):
                    yield np.concatenate(parts)
                    parts, count = [], 0
                parts.append(part)
                count += len(part)
        except av.error.FFmpegError as error:
            raise ValueError(f"{path}: damaged audio ({_said(error)})") from error
        if parts:
            yield np.concatenate(parts)


def _floats_av(container: Any, stream: Any) -> Iterator[np.ndarray]:
    """The decoded audio [n, C] at the rate that the stream begins with.

    Where files were joined, a part may have another rate and other channels.
    """
    import av

    rate, kind, resampler = stream.rate, (), None
    for frame in chain(_frames_av(container, stream), [None]):
        now = frame and (frame.format.name, frame.layout.name, frame.sample_rate)
        converted = []
        if now != kind:
            converted += resampler.resample(None) if resampler else []
            # Packed floats keep the channels beside each other.
            resampler, kind = av.AudioResampler(format="flt", rate=rate), now
        converted += resampler.resample(frame)
        for part in converted:
            yield part.to_ndarray().reshape(-1, part.layout.nb_channels)


def _frames_av(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames. Between two MP3 or Ogg streams there may be what is none of either."""
    import av

    if container.format.name not in ("mp3", "ogg"):
        yield from container.decode(stream)
        return
    failure, decoded = None, False
    for packet in container.demux(stream):
        try:
            for frame in packet.decode():
                decoded = True
                yield frame
        except av.error.InvalidDataError as error:
            failure = error
    if failure is not None and not decoded:
        raise failure


def _said(error: Exception) -> str:
    """What FFmpeg says, without its number and the path."""
    return getattr(error, "strerror", None) or str(error)
