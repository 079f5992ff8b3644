"""Stage 3: speak every training sentence with flite and keep only text and codes, in shards.

A shard holds those of `BLOCK` sentences that are of the templates' vocabulary (`closed`), or those
that are not (`open`), each by one of the named voices, or the first ones again, each by one of the
unnamed voices (`unnamed`). A shard that exists is done, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fish_speech.datasets.protos.stream import write_shard
from fish_speech.datasets.shards import Sample, text_data
from fish_speech.models.vqgan import Codec, load_codec
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.voices import UNNAMED, VOICES, speak
from recipes.tiny.words import is_closed

BLOCK = 256
KINDS = ("closed", "open", "unnamed")


def speaker_of(index: int) -> str:
    """Name of the voice that speaks sentence `index`: each has a third of them."""
    return list(VOICES)[index % len(VOICES)]


def jobs_of(texts: list[str], begin: int, kind: str) -> list[tuple[str, str]]:
    """Text and speaker of what a kind of shard holds of the block from sentence `begin`."""
    voices = list(UNNAMED)
    return [
        (texts[index], voices[index % len(voices)] if kind == "unnamed" else speaker_of(index))
        for index in range(begin, min(begin + BLOCK, len(texts)))
        if is_closed(texts[index]) == (kind != "open")
    ]


def encode(codec: Codec, waveforms: list[np.ndarray], batch_size: int = 16) -> list[np.ndarray]:
    """Codes [K, T] (uint16) of each waveform [N]; alike lengths are encoded together."""
    import torch

    order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    codes: dict[int, np.ndarray] = {}
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        lengths = torch.tensor([len(waveforms[index]) for index in indices])
        size = int(lengths.max())
        padded = np.stack([np.pad(waveforms[i], (0, size - len(waveforms[i]))) for i in indices])
        found, frames = codec.encode(torch.from_numpy(padded)[:, None].to(codec.device), lengths)
        for row, index in enumerate(indices):
            codes[index] = found[row, :, : frames[row]].cpu().numpy().astype(np.uint16)
    return [codes[index] for index in range(len(waveforms))]


def speak_block(jobs: list[tuple[str, str]], codec: Codec, pool: ThreadPoolExecutor) -> list:
    """Messages of texts and who speaks each, one for each speaker."""
    codes = encode(codec, list(pool.map(lambda job: speak(*job), jobs)))
    samples = [Sample(*job, spoken) for job, spoken in zip(jobs, codes, strict=True)]
    return [
        message
        for speaker in sorted({speaker for _, speaker in jobs})
        for message in text_data((s for s in samples if s.speaker == speaker), "flite")
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the texts")
    parser.add_argument("--codec", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument(
        "--closed", action="store_true", help="only sentences of the templates' vocabulary"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    texts = read_sentences("train.txt", args.cache)
    kinds = [kind for kind in KINDS if not (args.closed and kind == "open")]
    codec = load_codec(args.codec, args.device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in tqdm(range(0, len(texts), BLOCK), unit="block", disable=None):
            for kind in kinds:
                shard = args.cache / "shards" / f"{begin // BLOCK:05d}-{kind}.protos"
                if not shard.exists():
                    write_shard(shard, speak_block(jobs_of(texts, begin, kind), codec, pool))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
