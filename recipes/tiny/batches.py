"""Batches of training items: noise on the input codes, shapes from a few buckets.

Every item has an approximate alignment of its frames to its text, for the guided attention loss
(`train.guided_attention_loss`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fish_speech.conversation import IGNORE_INDEX, Utterance, build_item
from fish_speech.tokenizer import FishTokenizer
from recipes.tiny.voices import VOICES

# Every batch of a process has as many columns: a CPU prepares its kernels once a shape.
COLUMNS = 1152
BUCKETS = (72, 96, 128, 144, 192, 288, 384)  # lengths; each divides COLUMNS

NOISE = 0.22  # of the input codes, so that the model listens to the text and not only to itself


@dataclass(frozen=True)
class Mixture:
    """How often an item is more than one named utterance, as shares of all items.

    `joined`: two utterances spoken as one text, so that longer texts are known. `referenced`:
    another utterance of the voice comes first, as in cloning and in the chunks of a long text.
    `unnamed`: the speaker's name is left out. Items longer than every bucket are left out.
    """

    joined: float
    referenced: float
    unnamed: float


NAMED_SHARES = Mixture(joined=0.1, referenced=0.1, unnamed=0.1)
# For voices without a name of their own: what comes before tells the voice, and a name that nobody
# knows tells nothing, like the name of a voice that is about to be learned.
UNNAMED_SHARES = Mixture(joined=0.05, referenced=0.4, unnamed=0.3)
PLAIN_SHARES = Mixture(joined=0, referenced=0, unnamed=0)

Corpus = list[tuple[str, Utterance]]  # speaker and utterance
UNALIGNED = -1  # in the alignment of a column that predicts no frame


@dataclass(frozen=True)
class Item:
    """`tokens` and `labels` [K+1, T], and `alignment` [T]: the column of the letter that the frame
    predicted at column t speaks, `UNALIGNED` for other columns."""

    tokens: Tensor
    labels: Tensor
    alignment: Tensor


def token_durations(corpus: Corpus, tokenizer: FishTokenizer) -> np.ndarray:
    """Mean frames that each text token takes: [vocab_size], by least squares over whole utterances.

    Coarse (a letter's sound depends on its neighbours), but summed over a text it tells within a
    few letters where in it a frame is spoken.
    """
    size = tokenizer.vocab_size
    counts = np.stack(
        [np.bincount(tokenizer.encode(u.text), minlength=size) for _, u in corpus]
    ).astype(np.float32)
    frames = np.array([u.codes.shape[1] for _, u in corpus], dtype=np.float32)
    # A little ridge towards one frame: tokens that never occur have some duration too.
    durations = np.linalg.solve(counts.T @ counts + np.eye(size), counts.T @ frames + 1.0)
    return durations.clip(min=0.1)


def spoken_tokens(ids: list[int], frames: int, durations: np.ndarray) -> Tensor:
    """Roughly which of a text's tokens each of its frames speaks: [frames] (int64)."""
    ends = durations[ids].cumsum()
    middles = (np.arange(frames) + 0.5) / frames * ends[-1]
    return torch.from_numpy(np.searchsorted(ends, middles))


def batches(
    corpus: Corpus,
    tokenizer: FishTokenizer,
    durations: np.ndarray,
    generator: torch.Generator,
    *,
    plain: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless shuffled batches: tokens and labels [B, K+1, T] and alignment [B, T], padded to a
    bucket's T. If `plain`, an item is one named utterance and has no noise."""
    by_speaker: dict[str, list[Utterance]] = {}
    for speaker, utterance in corpus:
        by_speaker.setdefault(speaker, []).append(utterance)
    waiting: dict[int, list[Item]] = {size: [] for size in BUCKETS}
    while True:
        for index in torch.randperm(len(corpus), generator=generator).tolist():
            speaker, utterance = corpus[index]
            shares = NAMED_SHARES if speaker in VOICES else UNNAMED_SHARES
            mixture = PLAIN_SHARES if plain else shares
            chosen = _choose(utterance, speaker, by_speaker[speaker], mixture, generator)
            item = build_aligned_item(tokenizer, *chosen, durations)
            length = len(item.alignment)
            if length > BUCKETS[-1]:
                continue
            size = next(size for size in BUCKETS if size >= length)
            waiting[size].append(item)
            if len(waiting[size]) == COLUMNS // size:
                tokens, labels, alignment = collate(waiting[size], size, tokenizer.end_of_text_id)
                if not plain:
                    tokens = add_noise(tokens, tokenizer, NOISE, generator)
                yield tokens, labels, alignment
                waiting[size] = []


def _choose(
    utterance: Utterance,
    speaker: str,
    others: list[Utterance],
    mixture: Mixture,
    generator: torch.Generator,
) -> tuple[Utterance, list[Utterance], str | None]:
    """What is spoken, what comes before it, and the name of the speaker if it is given."""
    chance, unnamed = torch.rand(2, generator=generator).tolist()
    other = others[int(torch.randint(len(others), (1,), generator=generator))]
    references = []
    if chance < mixture.joined:
        codes = torch.cat([utterance.codes, other.codes], dim=1)
        utterance = Utterance(f"{utterance.text} {other.text}", codes)
    elif chance < mixture.joined + mixture.referenced:
        references = [other]
    name = speaker if speaker in VOICES else _random_name(generator)
    return utterance, references, None if unnamed < mixture.unnamed else name


def _random_name(generator: torch.Generator) -> str:
    """A name of two to eight letters, in either case."""
    size = int(torch.randint(2, 9, (1,), generator=generator))
    letters = torch.randint(26, (size,), generator=generator)
    first = "aA"[int(torch.randint(2, (1,), generator=generator))]
    return bytes(ord(first) + int(letter) for letter in letters).decode()


def build_aligned_item(
    tokenizer: FishTokenizer,
    utterance: Utterance,
    references: list[Utterance],
    speaker: str | None,
    durations: np.ndarray,
) -> Item:
    """The package's training item of an utterance, with its alignment."""
    tokens, labels = build_item(tokenizer, utterance, references=references, speaker=speaker)
    frames = utterance.codes.shape[1]
    # The item ends with the frames, and the columns that predict them begin with <|voice|>.
    voice = tokens.shape[1] - frames - 1
    im_end = (tokens[0, :voice] == tokenizer.im_end_id).nonzero()[-1].item()
    spoken = tokenizer.encode(utterance.text)
    alignment = torch.full((tokens.shape[1],), UNALIGNED)
    alignment[voice:-1] = im_end - len(spoken) + spoken_tokens(spoken, frames, durations)
    return Item(tokens, labels, alignment)


def collate(items: list[Item], size: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stack items to tokens and labels [B, K+1, size] and alignment [B, size], right-padded."""
    rows = len(items[0].tokens)
    tokens = torch.zeros(len(items), rows, size, dtype=torch.long)
    tokens[:, 0] = pad_id
    labels = torch.full_like(tokens, IGNORE_INDEX)
    alignment = torch.full((len(items), size), UNALIGNED)
    for row, item in enumerate(items):
        length = len(item.alignment)
        tokens[row, :, :length] = item.tokens
        labels[row, :, :length] = item.labels
        alignment[row, :length] = item.alignment
    return tokens, labels, alignment


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
