"""Stage 5: write a trained transformer and a codec as a model directory at half precision."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from fish_speech.models.text2semantic import save_model
from fish_speech.models.vqgan.codec import CODEC_CONFIG_FILE, find_codec
from fish_speech.models.weights import read_checkpoint, read_state_dict, save_tensors
from recipes.tiny.model import new_model, tiny_config, tiny_tokenizer
from recipes.tiny.texts import CACHE
from recipes.tiny.train import CHECKPOINT


def export_model(checkpoint: Path | None, directory: Path) -> None:
    """Save a training checkpoint, or seeded random weights, with config and tokenizer."""
    if checkpoint is None:
        state = new_model(seed=0).state_dict()
    else:
        state = read_checkpoint(checkpoint)["model"]
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    save_model(state, directory, config=config, tokenizer=tokenizer, dtype=torch.float16)


def export_codec(source: Path, directory: Path) -> None:
    """Copy the codec of a model directory, at half precision."""
    file = find_codec(source)
    state = {key: value.half() for key, value in read_state_dict(file, prefixes=()).items()}
    save_tensors({key: value.clone() for key, value in state.items()}, directory / file.name)
    if source.resolve() != directory.resolve():
        shutil.copyfile(source / CODEC_CONFIG_FILE, directory / CODEC_CONFIG_FILE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CACHE / CHECKPOINT)
    parser.add_argument("--random", action="store_true", help="random weights: for tests only")
    parser.add_argument("--codec", type=Path, help="model directory whose codec to take")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny"))
    args = parser.parse_args(argv)
    export_model(None if args.random else args.checkpoint, args.output)
    if args.codec:
        export_codec(args.codec, args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir()) / 1e6
    print(f"{args.output}: {size:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
