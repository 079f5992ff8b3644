"""Stage 6: word error rates of teacher, codec resynthesis and synthesis on held-out sentences.

The recogniser (pocketsphinx, its own US English model) took no part in the training. Words are
compared as `fish_speech.preparation.error_rates` normalises them. A runaway is a synthesis, at the
first try, that did not end in the time its text can take.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fish_speech.evaluation.asr import PocketSphinx
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.preparation.error_rates import word_errors
from recipes.tiny.speech import speaker_of
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.voices import VOICES, speak
from recipes.tiny.words import in_vocabulary


@lru_cache(maxsize=1)
def recogniser() -> PocketSphinx:
    """One a process."""
    return PocketSphinx()


def recognise(samples: np.ndarray) -> str:
    """The words that pocketsphinx hears in float32 audio [N] at 16 kHz."""
    return recogniser().transcribe(samples).text


@torch.no_grad()
def resynthesise(codec: Codec, samples: np.ndarray) -> np.ndarray:
    """Audio [N] through the codec and back."""
    waveforms, _ = codec.decode(*codec.encode(torch.from_numpy(samples)[None, None]))
    return waveforms[0, 0].numpy()


def synthesise(tts: TextToSpeech, text: str, speaker: str, seed: int) -> tuple[np.ndarray, bool]:
    """Audio [N] of a text, and whether it is a runaway."""
    pieces = list(tts.pieces(text, speaker=speaker, settings=Settings(seed=seed, retries=0)))
    waveform = torch.cat([piece.waveform for piece in pieces], dim=1)[0].numpy()
    return waveform, any(piece.ran_on for piece in pieces)


def error_rate(texts: list[str], heard: list[str]) -> float:
    """Word errors over words, all sentences together."""
    errors = [word_errors(text, words) for text, words in zip(texts, heard, strict=True)]
    return sum(e.count for e in errors) / sum(e.length for e in errors)


def rows(
    texts: list[str], codec: Codec, tts: TextToSpeech, recognise_all: Callable
) -> Iterator[tuple[str, float, float, float, int]]:
    """For each voice and all together: teacher, resynthesis, synthesis, runaways."""
    said: list[str] = []
    heard: list[list[str]] = [[], [], []]
    total_runaways = 0
    for speaker in VOICES:
        mine = [text for index, text in enumerate(texts) if speaker_of(index) == speaker]
        spoken = [speak(text, speaker) for text in mine]
        again = [resynthesise(codec, samples) for samples in tqdm(spoken, disable=None)]
        made = [synthesise(tts, t, speaker, i) for i, t in enumerate(tqdm(mine, disable=None))]
        audio = (spoken, again, [samples for samples, _ in made])
        words = [list(recognise_all(recognise, part)) for part in audio]
        runaways = sum(runaway for _, runaway in made)
        yield speaker, *(error_rate(mine, part) for part in words), runaways
        said, total_runaways = said + mine, total_runaways + runaways
        heard = [old + new for old, new in zip(heard, words, strict=True)]
    yield "all", *(error_rate(said, part) for part in heard), total_runaways


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of heldout.txt")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--sentences", type=int, default=120, help="of each kind, for all voices")
    args = parser.parse_args(argv)
    try:
        texts = read_sentences("heldout.txt", args.cache)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    groups = {
        "words of the templates": [text for text in texts if in_vocabulary(text)],
        "any words": [text for text in texts if not in_vocabulary(text)],
    }
    codec, tts = load_codec(args.model), TextToSpeech.from_pretrained(args.model, device="cpu")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for title, group in groups.items():
            group = group[: args.sentences]
            print(f"word error rate, {len(group)} held-out sentences, {title}")
            print(f"{'voice':8}{'teacher':>9}{'codec':>9}{'synthesis':>11}{'runaways':>10}")
            for name, *rates, runaways in rows(group, codec, tts, pool.map):
                shown = "{:9.3f}{:9.3f}{:11.3f}".format(*rates)
                print(f"{name:8}{shown}{runaways:10d}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
