"""Stage 3: speak every training sentence with flite and keep only text and codes, in shards.

A shard holds those of `BLOCK` sentences that are of the templates' vocabulary, or those that are
not; a shard that exists is done, so that a stopped run goes on where it was. The voice `rms` is
left out on purpose: the demo teaches it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fish_speech.datasets.protos.stream import write_shard
from fish_speech.datasets.shards import Sample, text_data
from fish_speech.models.vqgan import Codec, load_codec
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.words import is_closed

SAMPLE_RATE = 16000
VOICES = {"SLT": "slt", "KAL": "kal16", "AWB": "awb"}  # name in the prompt: voice of flite
BLOCK = 256


def speaker_of(index: int) -> str:
    """Name of the voice that speaks sentence `index`: each has a third of them."""
    return list(VOICES)[index % len(VOICES)]


def speak(text: str, speaker: str) -> np.ndarray:
    """Speak `text` with flite, by one of `VOICES` or another of flite's: float32 [N] at 16 kHz,
    trimmed to 50 ms before and 100 ms after."""
    import soundfile

    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", VOICES.get(speaker, speaker), "-t", text, "-o", file.name]
        subprocess.run(command, check=True, capture_output=True)
        samples, sample_rate = soundfile.read(file.name, dtype="float32")
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"flite spoke at {sample_rate} Hz instead of {SAMPLE_RATE}")
    return trim(samples)


def trim(samples: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """Cut silence (below `threshold` of the peak) to 50 ms before the speech and 100 ms after."""
    level = np.abs(samples)
    loud = np.flatnonzero(level > threshold * level.max(initial=0.0))
    if len(loud) == 0:
        return samples
    first, last = loud[0] - SAMPLE_RATE // 20, loud[-1] + SAMPLE_RATE // 10
    return samples[max(0, first) : last]


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
        for speaker in VOICES
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
    jobs = [(text, speaker_of(index)) for index, text in enumerate(texts)]
    codec = load_codec(args.codec, args.device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in tqdm(range(0, len(jobs), BLOCK), unit="block", disable=None):
            block = jobs[begin : begin + BLOCK]
            for kind in ("closed",) if args.closed else ("closed", "open"):
                shard = args.cache / "shards" / f"{begin // BLOCK:05d}-{kind}.protos"
                mine = [job for job in block if is_closed(job[0]) == (kind == "closed")]
                if not shard.exists():
                    write_shard(shard, speak_block(mine, codec, pool))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
