"""Batches of training items: noise on the input codes, shapes from a few buckets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fish_speech.conversation import IGNORED, Utterance, build_item
from fish_speech.tokenizer import FishTokenizer

# Every batch of a process has as many columns: a CPU prepares its kernels once a shape.
COLUMNS = 1152
BUCKETS = (72, 96, 128, 144, 192, 288, 384)  # lengths; each divides COLUMNS


@dataclass(frozen=True)
class Mixture:
    """How often an item is more than one named utterance, as shares of all items.

    `joined`: two utterances spoken as one text, so that longer texts are known. `referenced`:
    another utterance of the voice comes first, as in cloning and in the chunks of a long text.
    `unnamed`: the speaker's name is left out. `noise`: input codes replaced at random, so that the
    model listens to the text and not only to itself. Items of more than `longest` columns are left
    out.
    """

    joined: float = 0.15
    referenced: float = 0.1
    unnamed: float = 0.15
    noise: float = 0.22
    longest: int = BUCKETS[-1]


Corpus = list[tuple[str, Utterance]]  # speaker and utterance


def batches(
    corpus: Corpus, tokenizer: FishTokenizer, mixture: Mixture, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches: tokens and labels [B, K+1, T], padded to a bucket's T."""
    by_speaker: dict[str, list[Utterance]] = {}
    for speaker, utterance in corpus:
        by_speaker.setdefault(speaker, []).append(utterance)
    waiting: dict[int, list[tuple[Tensor, Tensor]]] = {size: [] for size in BUCKETS}
    while True:
        for index in torch.randperm(len(corpus), generator=generator).tolist():
            speaker, utterance = corpus[index]
            item = _item(utterance, speaker, by_speaker[speaker], tokenizer, mixture, generator)
            if item[0].shape[1] > mixture.longest:
                continue
            size = next(size for size in BUCKETS if size >= item[0].shape[1])
            waiting[size].append(item)
            if len(waiting[size]) == COLUMNS // size:
                tokens, labels = collate(waiting[size], size, tokenizer.end_of_text_id)
                yield add_noise(tokens, tokenizer, mixture.noise, generator), labels
                waiting[size] = []


def _item(
    utterance: Utterance,
    speaker: str,
    others: list[Utterance],
    tokenizer: FishTokenizer,
    mixture: Mixture,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    chance, unnamed = torch.rand(2, generator=generator).tolist()
    other = others[int(torch.randint(len(others), (1,), generator=generator))]
    references = []
    if chance < mixture.joined:
        codes = torch.cat([utterance.codes, other.codes], dim=1)
        utterance = Utterance(f"{utterance.text} {other.text}", codes)
    elif chance < mixture.joined + mixture.referenced:
        references = [other]
    name = None if unnamed < mixture.unnamed else speaker
    return build_item(tokenizer, utterance, references=references, speaker=name)


def collate(items: list[tuple[Tensor, Tensor]], size: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack items [K+1, t] to tokens and labels [B, K+1, size], padded on the right."""
    rows = len(items[0][0])
    tokens = torch.zeros(len(items), rows, size, dtype=torch.long)
    tokens[:, 0] = pad_id
    labels = torch.full_like(tokens, IGNORED)
    for row, (item_tokens, item_labels) in enumerate(items):
        tokens[row, :, : item_tokens.shape[1]] = item_tokens
        labels[row, :, : item_labels.shape[1]] = item_labels
    return tokens, labels


def add_noise(
    tokens: Tensor, tokenizer: FishTokenizer, share: float, generator: torch.Generator
) -> Tensor:
    """Replace a share of the codes of frames by random ones; row 0 follows the first code."""
    tokens = tokens.clone()
    begin, size = tokenizer.semantic_begin_id, tokenizer.codebook_size
    codes = tokens[:, 1:]
    frames = (tokens[:, :1] >= begin) & (tokens[:, :1] < begin + size)
    noisy = frames & (torch.rand(codes.shape, generator=generator) < share)
    random = torch.randint(1000, codes.shape, generator=generator)  # 8 x 5 x 5 x 5 are in use
    codes[noisy] = random[noisy]
    tokens[:, :1] = torch.where(frames, codes[:, :1] + begin, tokens[:, :1])
    return tokens
