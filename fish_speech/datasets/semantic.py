"""Training data in memory: items, their order, and batches.

The order of items is a pure function of a seed and a position, so that a resumed run needs no
loader state: it starts at the position of its step.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fish_speech.conversation import IGNORE_INDEX, Utterance, build_item, with_speaker
from fish_speech.datasets.shards import Sample
from fish_speech.signals import stop_signals
from fish_speech.tokenizer import FishTokenizer

_POOL_BATCHES = 16  # batches whose items are sorted by length together


class SampleKey(NamedTuple):
    """One item of the endless stream, and what its whole optimizer step holds.

    `step_items` and `step_frames` let every batch weigh its labels so that a step is the mean over
    all of them, however they are split over micro-batches and processes.
    """

    epoch: int
    index: int
    step_items: int
    step_frames: int


class SemanticDataset(Dataset):
    """Items of `conversation.build_item`, some with another utterance of the speaker in front.

    What is drawn for an item depends on (seed, epoch, index) alone. Samples whose item would exceed
    `max_length` positions are left out (`too_long` names their clips).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: FishTokenizer,
        *,
        max_length: int,
        name_speakers: bool = False,
        reference_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed
        self.name_speakers = name_speakers
        self.reference_share = reference_share
        nothing = Utterance("", torch.zeros(1, 0, dtype=torch.long))
        self._overhead = build_item(tokenizer, nothing)[0].shape[1] + 1
        positions = [self._count_positions(sample) for sample in samples]
        fits = [count <= max_length for count in positions]
        self.samples = list(compress(samples, fits))
        self._num_positions = list(compress(positions, fits))
        self.too_long = [s.name for s, short in zip(samples, fits, strict=True) if not short]
        self.by_speaker: dict[str, list[int]] = {}
        for index, sample in enumerate(self.samples):
            self.by_speaker.setdefault(sample.speaker, []).append(index)

    def __len__(self) -> int:
        return len(self.samples)

    def num_frames(self, index: int) -> int:
        """Frames of a sample: the length that batches are sorted by."""
        return self.samples[index].codes.shape[1]

    def num_positions(self, index: int) -> int:
        """Positions of a sample's item without a reference, at most."""
        return self._num_positions[index]

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor | SampleKey]:
        """`tokens` and `labels` [K+1, T] (int64) of an item."""
        rng = random.Random(f"{self.seed} {key.epoch} {key.index}")
        sample = self.samples[key.index]
        tokens, labels = build_item(
            self.tokenizer,
            sample.utterance(),
            references=self._references(key.index, rng),
            speaker=sample.speaker if self.name_speakers else None,
        )
        return {"tokens": tokens, "labels": labels, "key": key}

    def _references(self, index: int, rng: random.Random) -> list[Utterance]:
        others = self.by_speaker[self.samples[index].speaker]
        if rng.random() >= self.reference_share or len(others) < 2:
            return []
        other = rng.choice(others)
        if other == index:
            other = others[(others.index(other) + 1) % len(others)]
        if self._num_positions[index] + self._num_positions[other] > self.max_length:
            return []
        return [self.samples[other].utterance()]

    def _count_positions(self, sample: Sample) -> int:
        text = with_speaker(sample.text, sample.speaker if self.name_speakers else None)
        return len(self.tokenizer.encode(text)) + sample.codes.shape[1] + self._overhead


class StepBatchSampler:
    """Endless micro-batches for one process: lists of `SampleKey`, from a position on.

    Every epoch is a permutation, sorted by length within pools so that the items of a batch are
    alike. The stream of epochs is cut into optimizer steps of
    `batch_size * accumulate * world_size` items; a process takes its share of each.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        accumulate: int = 1,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.accumulate, self.start_step = accumulate, start_step
        self.rank, self.world_size = rank, world_size
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step_size = self.batch_size * self.accumulate * self.world_size
        step = self.start_step
        while True:
            chosen = [self._sample_at(step * step_size + i) for i in range(step_size)]
            frames = sum(self.lengths[index] for _, index in chosen)
            keys = [SampleKey(epoch, index, step_size, frames) for epoch, index in chosen]
            for micro in range(self.accumulate):
                begin = (micro * self.world_size + self.rank) * self.batch_size
                yield keys[begin : begin + self.batch_size]
            step += 1

    def _sample_at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, len(self.lengths))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return epoch, self._epoch[1][offset]

    def _order(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        step_size = self.batch_size * self.accumulate * self.world_size
        # The step that the last epoch began is filled up first, so that the chunks of items of
        # about the same length fall on whole steps.
        head = -epoch * len(order) % step_size
        chunks, short = [], []
        for begin in range(head, len(order), _POOL_BATCHES * step_size):
            pool = order[begin : begin + _POOL_BATCHES * step_size]
            pool.sort(key=self.lengths.__getitem__)
            whole = len(pool) - len(pool) % step_size
            chunks += [pool[i : i + step_size] for i in range(0, whole, step_size)]
            short = pool[whole:]
        rng.shuffle(chunks)
        return [*order[:head], *(index for chunk in chunks for index in chunk), *short]


def collate(items: Sequence[dict], pad_id: int) -> dict[str, Tensor]:
    """Pad items on the right.

    Returns `tokens` and `labels` [B, K+1, T], `key_padding_mask [B, T]` (True at padding), and the
    labels that the whole step has: `step_tokens` (row 0) and `step_frames`.
    """
    length = max(item["tokens"].shape[1] for item in items)
    rows = items[0]["tokens"].shape[0]
    tokens = torch.zeros(len(items), rows, length, dtype=torch.long)
    tokens[:, 0] = pad_id
    labels = torch.full((len(items), rows, length), IGNORE_INDEX)
    padding = torch.ones(len(items), length, dtype=torch.bool)
    for i, item in enumerate(items):
        positions = item["tokens"].shape[1]
        tokens[i, :, :positions] = item["tokens"]
        labels[i, :, :positions] = item["labels"]
        padding[i, :positions] = False
    key: SampleKey = items[0]["key"]
    # An item's row 0 learns <|voice|>, its frames and <|im_end|>.
    return {
        "tokens": tokens,
        "labels": labels,
        "key_padding_mask": padding,
        "step_tokens": torch.tensor(key.step_frames + 2 * key.step_items),
        "step_frames": torch.tensor(key.step_frames),
        "indices": torch.tensor([item["key"].index for item in items]),
    }


class SemanticDataModule(L.LightningDataModule):
    """Loaders of a run: the endless training stream from `start_step`, and the held-out samples."""

    def __init__(
        self,
        train: SemanticDataset,
        validation: SemanticDataset | None,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        # More items in a batch than there are would only repeat them.
        self.batch_size = min(batch_size, len(train))
        self.accumulate, self.seed, self.num_workers = accumulate, seed, num_workers
        self.start_step = 0

    def train_dataloader(self) -> DataLoader:
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        batches = StepBatchSampler(
            [self.train.num_frames(i) for i in range(len(self.train))],
            self.batch_size,
            seed=self.seed,
            accumulate=self.accumulate,
            start_step=self.start_step,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(self.train, batches)

    def val_dataloader(self) -> DataLoader | list:
        if self.validation is None or not len(self.validation):
            return []
        order = sorted(range(len(self.validation)), key=self.validation.num_frames)
        batches = [
            [SampleKey(0, index, 0, 0) for index in order[i : i + self.batch_size]]
            for i in range(0, len(order), self.batch_size)
        ]
        return self._loader(self.validation, batches)

    def _loader(self, dataset: SemanticDataset, batches) -> DataLoader:
        pad_id = dataset.tokenizer.end_of_text_id  # as upstream pads
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=partial(collate, pad_id=pad_id),
            worker_init_fn=_ignore_signals,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _ignore_signals(worker: int) -> None:
    """Ctrl+C and SLURM's signals reach workers too, but the current step still needs their batches.
    They end with the process that they work for."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
