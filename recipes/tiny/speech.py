"""Stage 3: speak every training sentence with flite and keep only text and codes, in shards.

A shard holds those of `BLOCK` sentences that are of the templates' vocabulary (`closed`), or those
that are not (`open`), each by one of the named voices, or the first ones again, a few by each
unnamed voice (`unnamed`), or a quarter of them by strangers (`disguised`). A shard that exists is
done, so that a stopped run goes on where it was; the last block, which is held out from training,
is made first, so that a stopped run is of use.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fish_speech.datasets.protos.stream import write_shard
from fish_speech.datasets.protos.text_data_pb2 import Sentence
from fish_speech.datasets.shards import sentence, text_data
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.worker_processes import die_with_parent
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.voices import VOICES, disguised_speaker, speak, unnamed_speaker
from recipes.tiny.words import in_vocabulary

BLOCK = 256
NEIGHBOURS = 8  # sentences, about half of them known, that one voice speaks
KINDS = ("closed", "open", "unnamed", "disguised")


def speaker_of(index: int) -> str:
    """Name of the voice that speaks sentence `index`: each has a third of them."""
    return list(VOICES)[index % len(VOICES)]


def jobs_of(texts: list[str], begin: int, kind: str) -> list[tuple[str, str]]:
    """Text and speaker of what a kind of shard holds of the block from sentence `begin`."""
    indices = [
        index
        for index in range(begin, min(begin + BLOCK, len(texts)))
        if in_vocabulary(texts[index]) == (kind != "open")
    ]
    if kind == "unnamed":
        return [(texts[index], unnamed_speaker(index // NEIGHBOURS)) for index in indices]
    if kind == "disguised":
        groups = [(index, index // NEIGHBOURS) for index in indices]
        return [
            (texts[index], disguised_speaker(group)) for index, group in groups if group % 4 == 0
        ]
    return [(texts[index], speaker_of(index)) for index in indices]


def encode(codec: Codec, waveforms: list[np.ndarray], batch_size: int = 16) -> list[np.ndarray]:
    """Codes [K, T] (uint16) of each waveform [N]; similar lengths are encoded together."""
    order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    codes: dict[int, np.ndarray] = {}
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        batch = [torch.from_numpy(waveforms[index])[None] for index in indices]
        for index, found in zip(indices, codec.encode_batch(batch), strict=True):
            codes[index] = found.numpy().astype(np.uint16)
    return [codes[index] for index in range(len(waveforms))]


def speak_block(jobs: list[tuple[str, str]], codec: Codec, pool: ThreadPoolExecutor) -> list:
    """Messages of texts and who speaks each, one for each speaker."""
    codes = encode(codec, list(pool.map(lambda job: speak(*job), jobs)))
    spoken: dict[str, list[Sentence]] = {}
    for (text, speaker), found in zip(jobs, codes, strict=True):
        spoken.setdefault(speaker, []).append(sentence(text, found))
    return [
        message
        for speaker in sorted(spoken)
        for message in text_data(spoken[speaker], "flite", speaker)
    ]


def missing_shards(texts: list[str], args: argparse.Namespace) -> list[tuple[Path, list]]:
    """The shards still to be made, each with its jobs; those of the last block first."""
    begins = list(range(0, len(texts), BLOCK))
    kinds = [kind for kind in KINDS if not (args.closed and kind == "open")]
    shards = [
        (args.cache / "shards" / f"{begin // BLOCK:05d}-{kind}.protos", jobs_of(texts, begin, kind))
        for begin in (begins[-1], *begins[:-1])
        for kind in kinds
    ]
    return [(path, jobs) for path, jobs in shards if not path.exists()]


def work(process: int, missing: list[tuple[Path, list]], args: argparse.Namespace) -> None:
    """One of `args.processes` processes: every so many-th of the shards."""
    if args.processes > 1:
        die_with_parent()
        torch.set_num_threads(1)
    codec = load_codec(args.codec, args.device)
    share = missing[process :: args.processes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, jobs in tqdm(share, unit="shard", disable=True if process else None):
            write_shard(path, speak_block(jobs, codec, pool))


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the texts")
    parser.add_argument("--codec", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument(
        "--closed", action="store_true", help="only sentences of the templates' vocabulary"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--processes", type=int, default=1 if cuda else 2)
    args = parser.parse_args(argv)
    missing = missing_shards(read_sentences("train.txt", args.cache), args)
    if args.processes > 1:
        torch.multiprocessing.spawn(work, (missing, args), nprocs=args.processes)
    else:
        work(0, missing, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
