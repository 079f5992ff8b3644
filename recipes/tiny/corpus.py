"""Read the shards of the speech stage."""

from __future__ import annotations

from pathlib import Path

from fish_speech.datasets.shards import read_samples
from recipes.tiny.batches import Corpus


def read_corpus(cache: Path) -> tuple[Corpus, Corpus]:
    """Speaker and utterance of everything spoken so far: training and held out.

    Held out is the last block of sentences, whoever speaks them. Raises `FileNotFoundError` if
    there is nothing.
    """
    shards = sorted((cache / "shards").glob("*.protos"))
    if not shards:
        raise FileNotFoundError(f"{cache / 'shards'}: no shards; run recipes.tiny.speech first")
    last = shards[-1].name.split("-")[0]
    held_out = [shard for shard in shards if shard.name.startswith(last)]
    return _read(shards[: -len(held_out)]), _read(held_out)


def _read(shards: list[Path]) -> Corpus:
    return [(sample.speaker, sample.utterance("int16")) for sample in read_samples(shards)]
