"""Encoding a dataset's clips into codes: `<name>.npy` beside each `<name>.wav`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fish_speech.audio import load_audio
from fish_speech.audio_decoding import audio_info, truncation
from fish_speech.console import error_message
from fish_speech.datasets.clips import CODES_RECORD, Clip, find_clips, read_codes_records
from fish_speech.datasets.shards import read_codes
from fish_speech.files import atomic_path, file_digest, write_json
from fish_speech.models.vqgan import Codec, find_codec

_SAVE_RECORD_EVERY = 20  # batches


@dataclass
class Extraction:
    """Clips whose codes were made, were there already, or could not be made (name: reason)."""

    made: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def extract_codes(
    data_dir: Path,
    codec: Codec,
    model_dir: Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Extraction:
    """Encode the clips of a dataset that have no codes of this codec and this audio yet.

    What codes were made of is recorded in `codes.json`, so that they are made again when the audio
    or the codec changes. Codes without a record (made elsewhere) are kept where they fit the audio.
    Of several processes each takes its share of the clips.
    """
    record_file = data_dir / (f"codes.{rank}.json" if rank else CODES_RECORD)
    digest = file_digest(find_codec(model_dir))
    records = read_codes_records(data_dir)
    # Of the clips that this process has dealt with; None: their codes are of other audio or codec.
    stamps: dict[str, list | None] = {}
    record = {"codec": digest, "clips": stamps}
    result = Extraction()
    work = []
    for clip in find_clips(data_dir)[rank::world_size]:
        # Other processes may have dealt with the clip before; where two records differ, it is not
        # known which one is later.
        named = [record for record in records if clip.name in record["clips"]]
        current, noted = all(record["codec"] == digest for record in named), []
        if current:  # else the codes are stale anyway, and the audio need not be read
            noted = [
                _stamp_if_unchanged(clip.audio, record["clips"][clip.name]) for record in named
            ]
            current = all(noted)
        if current and (_has_codes(clip, codec) if named else _fits(clip, codec)):
            stamps[clip.name] = noted[0] if named else _stamp(clip.audio)
            result.kept += 1
        elif not named and (what := _foreign_array(clip.codes)):
            result.failed[clip.name] = (
                f"{clip.codes}: {what}, where the clip's codes are to be; move or delete it"
            )
        else:
            work.append(clip)
            if clip.codes.is_file():
                stamps[clip.name] = None
    try:
        with tqdm(total=len(work), desc="extracting", unit="clip", disable=None) as progress:
            for number, batch in enumerate(_loader(work, codec, batch_size, num_workers)):
                _encode(batch, codec, stamps, result)
                progress.update(len(batch))
                if number % _SAVE_RECORD_EVERY == 0:
                    write_json(record_file, record)
    finally:
        write_json(record_file, record)
        if world_size == 1:  # which holds all clips; those of more processes are out of date
            for file in set(data_dir.glob("codes.*.json")) - {record_file}:
                file.unlink()
    return result


@dataclass
class _Loaded:
    clip: Clip
    waveform: Tensor | None  # [1, N]
    problem: str | None = None


def codecs_of_codes(data_dir: Path) -> set[str]:
    """The digests of the codecs that made the codes there are, as far as that is recorded."""
    return {record["codec"] for record in read_codes_records(data_dir)}


def _encode(batch: list[_Loaded], codec: Codec, stamps: dict, result: Extraction) -> None:
    for item in batch:
        if item.problem is not None:
            result.failed[item.clip.name] = item.problem
            item.clip.codes.unlink(missing_ok=True)  # of audio that there is no more
            stamps.pop(item.clip.name, None)
    whole = [item for item in batch if item.waveform is not None]
    if not whole:
        return
    encoded = codec.encode_batch([item.waveform for item in whole])
    for item, codes in zip(whole, encoded, strict=True):
        with atomic_path(item.clip.codes) as temporary:
            np.save(temporary, codes.numpy().astype(np.int16))
        stamps[item.clip.name] = _stamp(item.clip.audio)
        result.made += 1


class _Waveforms(Dataset):
    """Decodes clips at the codec's rate, in worker processes where there are some."""

    def __init__(self, clips: list[Clip], sample_rate: int, frame_length: int) -> None:
        self.clips, self.sample_rate, self.frame_length = clips, sample_rate, frame_length

    def __getitem__(self, index: int) -> _Loaded:
        clip = self.clips[index]
        try:
            waveform, rate = load_audio(clip.audio, self.sample_rate)
            # Codes of a part with the text of all of it would teach to leave words out.
            if broken := truncation(clip.audio, waveform.shape[1] / rate):
                raise ValueError(f"{clip.audio}: {broken}; prepare it again, or put back a copy")
        except (ValueError, OSError) as error:
            return _Loaded(clip, None, error_message(error))
        if waveform.shape[1] < self.frame_length:
            return _Loaded(clip, None, f"{clip.audio}: shorter than one frame of the codec")
        return _Loaded(clip, waveform)


def _loader(
    clips: list[Clip], codec: Codec, batch_size: int, num_workers: int
) -> Iterable[list[_Loaded]]:
    """Batches of clips of about the same length."""
    order = sorted(range(len(clips)), key=lambda i: _duration(clips[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    dataset = _Waveforms(clips, codec.sample_rate, codec.frame_length)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=num_workers)


def _duration(clip: Clip) -> float:
    try:
        return audio_info(clip.audio).duration or 0.0
    except (ValueError, OSError):
        return 0.0  # named as a failure when it is decoded


def _has_codes(clip: Clip, codec: Codec) -> bool:
    """Whether a clip's codes are there and no damaged file, as far as its header tells."""
    codes = _mapped(clip.codes)
    return _may_be_codes(codes) and codes.shape[0] == codec.num_codebooks


def _fits(clip: Clip, codec: Codec) -> bool:
    """Whether codes made elsewhere are as long as their audio and within the codebook."""
    try:
        codes = read_codes(clip.codes, codec.num_codebooks, codec.codebook_size)
    except (ValueError, OSError):
        return False
    return abs(codes.shape[1] - _duration(clip) * codec.frame_rate) <= 2


def _foreign_array(file: Path) -> str | None:
    """What an array is that can't be meant as codes; None for codes, even bad ones."""
    array = _mapped(file)
    if array is None or _may_be_codes(array):
        return None
    if not isinstance(array, np.ndarray):
        return "an archive of arrays"
    return f"an array {list(array.shape)} of {array.dtype}"


def _mapped(file: Path) -> Any:
    """What NumPy has in a file, of which only the header is read; None for no or a damaged file."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception:  # a flipped byte of a header raises almost anything
        return None


def _may_be_codes(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in "iu"


def _stamp(file: Path) -> list:
    """What identifies a file's content: its size, its time and its digest."""
    return [*_size_and_time(file), file_digest(file)]


def _size_and_time(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _stamp_if_unchanged(file: Path, stamp: Any) -> list | None:
    """The present stamp of a file if its content is that of `stamp`, else None.

    (A copy has another time. A damaged record may hold anything.)
    """
    if not isinstance(stamp, list) or len(stamp) < 2:
        return None
    try:
        now = _size_and_time(file)
        if stamp[:2] == now:
            return stamp if len(stamp) > 2 else _stamp(file)  # earlier versions took no digest
        copied = len(stamp) > 2 and stamp[0] == now[0] and stamp[2] == file_digest(file)
    except OSError:  # a link to nowhere, say: named as a failure when it is decoded
        return None
    return [*now, stamp[2]] if copied else None
