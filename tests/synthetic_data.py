"""A small dataset of made-up codes, as extraction leaves it, for tests of packing and training."""

from pathlib import Path

import numpy as np
import soundfile

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def make_data_set(folder: Path, speakers: dict[str, int], *, codebooks: int = 8) -> Path:
    """Write `speakers` (name: number of clips) with transcripts and codes; returns the folder."""
    rng = np.random.default_rng(0)
    for speaker, count in speakers.items():
        (folder / speaker).mkdir(parents=True)
        for number in range(count):
            stem = folder / speaker / f"clip_{number:04d}"
            tone = 0.3 * np.sin(np.arange(800) * (number + 1) / 40)  # clips alike aren't held out
            soundfile.write(f"{stem}.wav", tone, 8000)
            words = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(2 + number % 3))
            Path(f"{stem}.lab").write_text(f"{words}.", encoding="utf-8")
            codes = rng.integers(0, 1000, (codebooks, 6 + number % 5), dtype=np.int16)
            np.save(f"{stem}.npy", codes)
    return folder
