"""Read the shards of the speech stage."""

from __future__ import annotations

from pathlib import Path

import torch

from fish_speech.conversation import Utterance
from fish_speech.datasets.shards import read_samples
from recipes.tiny.batches import Corpus


def read_corpus(cache: Path) -> Corpus:
    """Speaker and utterance of everything spoken so far. Raises `FileNotFoundError` if nothing."""
    shards = sorted((cache / "shards").glob("*.protos"))
    if not shards:
        raise FileNotFoundError(f"{cache / 'shards'}: no shards; run recipes.tiny.speech first")
    return [
        (sample.speaker, Utterance(sample.text, torch.from_numpy(sample.codes.astype("int16"))))
        for sample in read_samples(shards)
    ]
