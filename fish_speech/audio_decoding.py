"""Reading audio files as they are: headers, channels block by block, signs of truncation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

# Sizes in bytes that programs write to a pipe; sox: whole frames of at most 0x7FFFF000.
_UNKNOWN_SIZES = {0, *range(0x7FFFF000 - 64, 0x7FFFF001), 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF}
_WAV_HEADER = 44  # bytes, the shortest
_LARGEST_WAV = 8 + 0xFFFFFFFF  # bytes, for its sizes have 32 bits
_CODEC_DELAY = 0.05  # seconds; an Ogg file may state so much more than it decodes to


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds: `sample_rate` in Hz and `duration` in seconds, where known.

    `floating`: its samples are saved as floats, which may be above 1 without being clipped.
    """

    sample_rate: int
    duration: float | None
    floating: bool = False


def audio_info(path: str | Path) -> AudioInfo:
    """Read a file's header. Raises `FileNotFoundError`, or `ValueError` where it is no audio."""
    path = _existing(path)
    if (info := _sndfile_info(path)) is not None:
        floating = info.subtype in ("FLOAT", "DOUBLE")
        return AudioInfo(info.samplerate, info.frames / info.samplerate, floating)
    with _open_av(path) as container:
        stream = container.streams.audio[0]
        guessed = container.format.name == "mp3" and not _mp3_states_its_length(path)
        if guessed or _outgrew_its_header(path):
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
        return AudioInfo(stream.rate, duration, floating)


def truncation(path: str | Path, seconds: float) -> str | None:
    """How a file that decoded to `seconds` of audio is truncated, in words; None if it is not."""
    path = _existing(path)
    expected = max(audio_info(path).duration or 0.0, seconds / _data_share(path))
    if seconds < min(0.97 * expected, expected - _CODEC_DELAY):
        return f"breaks off after {seconds:.1f} of {expected:.1f} s"
    return None if _ogg_is_complete(path) else f"breaks off after {seconds:.1f} s"


def wav_breaks_off(path: Path) -> bool:
    """Whether a WAV file has no samples, or fewer than its header says."""
    return path.stat().st_size <= _WAV_HEADER or _data_share(path) < 0.97


def channel_blocks(path: Path, seconds: float) -> Iterator[np.ndarray]:
    """Decode a file into float32 blocks [n, C] of about `seconds`; C may change where files were
    joined. Raises as `audio_info`, also where the file turns out to be damaged."""
    return (_blocks_av if _sndfile_info(path) is None else _blocks_sndfile)(path, seconds)


def _data_share(path: Path) -> float:
    """The share of its data chunk that a WAV or AIFF file really has; 1 for other files."""
    size, available = _data_chunk(path)
    # Programs that write to a pipe don't know the size.
    unknown = size in _UNKNOWN_SIZES or 1 << 32 > size >= 0x7FFFF000 > available
    return 1.0 if unknown else max(1e-3, min(1.0, available / size))


def _data_chunk(path: Path) -> tuple[int, int]:
    """The size of a WAV or AIFF file's data chunk by its header, and what follows in the file.

    In bytes; 0 and 0 for other files.
    """
    with path.open("rb") as file:
        form = file.read(4)
        kind, order = {b"RIFF": (b"data", "little"), b"RIFX": (b"data", "big"),
                       b"FORM": (b"SSND", "big"), b"RF64": (b"ds64", "little"),
                       }.get(form, (None, ""))  # fmt: skip
        file.seek(12)
        while kind is not None and len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], order)
            if head[:4] == b"ds64" == kind:  # which comes first, and has the size in 64 bits
                kind, long = b"data", int.from_bytes(file.read(16)[8:], order)
                file.seek(size - 16, 1)
                continue
            if head[:4] == kind:
                size = long if form == b"RF64" else size
                return size, path.stat().st_size - file.tell()
            file.seek(size + size % 2, 1)
    return 0, 0


def _outgrew_its_header(path: Path) -> bool:
    """Whether a WAV file has more samples than its header says.

    Sizes have 32 bits. Those of a longer file overflow, are the largest possible, or unknown.
    """
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return False
    size, available = _data_chunk(path)
    return 0 < size < available and (size in _UNKNOWN_SIZES or path.stat().st_size > _LARGEST_WAV)


def _ogg_is_complete(path: Path) -> bool:
    """Whether a file has the page that is marked as the last one, or is not Ogg."""
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


def _native(path: Path) -> str | bytes:
    """`path` as C code takes it, whatever bytes its name is made of."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def _sndfile_info(path: Path) -> Any:
    """libsndfile's view of the header; None where PyAV has to read the file.

    libsndfile stops at the length that it read or estimated: after the first of several MP3 or Ogg
    streams in a file, somewhere in an MP3 that states none, or at 4 GiB of a WAV file.
    """
    import soundfile

    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"OggS", b"ID3")) or head[:2] >= b"\xff\xe0":  # a frame of MP3
        return None  # where libsndfile would warn about lengths on standard error
    if _outgrew_its_header(path):
        return None
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

    options = {"ignore_length": "1"} if _outgrew_its_header(path) else {}
    try:
        # Absolute, for a bare "10:30.m4a" would be a protocol.
        container = av.open(str(path.absolute()), options=options)
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(
            f"{path}: not an audio file that can be decoded ({_ffmpeg_message(error)})"
        ) from error
    if not container.streams.audio:
        container.close()
        raise ValueError(f"{path}: the file has no audio track")
    if container.streams.audio[0].codec_context is None:
        container.close()
        raise ValueError(f"{path}: not an audio file that can be decoded (unknown codec)")
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
            for part in _samples_av(container, stream):
                if parts and (count >= enough or part.shape[1] != parts[0].shape[1]):
                    yield np.concatenate(parts)
                    parts, count = [], 0
                parts.append(part)
                count += len(part)
        except av.error.FFmpegError as error:
            raise ValueError(f"{path}: damaged audio ({_ffmpeg_message(error)})") from error
        if parts:
            yield np.concatenate(parts)


def _samples_av(container: Any, stream: Any) -> Iterator[np.ndarray]:
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
    """The decoded frames. Between two MP3 or Ogg streams there may be bytes that are neither's."""
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


def _ffmpeg_message(error: Exception) -> str:
    """FFmpeg's message, without the error number and the path."""
    return getattr(error, "strerror", None) or str(error)
