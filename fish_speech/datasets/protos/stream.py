"""A shard file: 4-byte lengths (native order, little-endian here), each before a `TextData`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from fish_speech.datasets.protos.text_data_pb2 import TextData
from fish_speech.files import atomic_path

_LENGTH = struct.Struct("<I")


def write_shard(path: str | Path, messages: Iterable[TextData]) -> None:
    """Write messages to a shard, one at a time, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for message in messages:
            data = message.SerializeToString()
            file.write(_LENGTH.pack(len(data)))
            file.write(data)


def read_shard(path: str | Path) -> Iterator[TextData]:
    """Yield the messages of a shard. Raises `ValueError` that names it where it is damaged."""
    with Path(path).open("rb") as file:
        while header := file.read(_LENGTH.size):
            if len(header) < _LENGTH.size:
                raise ValueError(f"{path}: cut short; run finetune_tts.py --build-dataset again")
            (length,) = _LENGTH.unpack(header)
            data = file.read(length)
            if len(data) < length:
                raise ValueError(f"{path}: cut short; run finetune_tts.py --build-dataset again")
            try:
                yield TextData.FromString(data)
            except DecodeError as error:
                raise ValueError(f"{path}: not a shard of text data ({error})") from error
