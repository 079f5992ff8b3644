import itertools

import numpy as np
import pytest
import torch

from fish_speech.conversation import IGNORE_INDEX
from fish_speech.datasets.semantic import SampleKey, SemanticDataset, StepBatchSampler, collate
from fish_speech.datasets.shards import Sample, read_samples
from tests.conftest import GOLDEN, golden_tensors


def dataset(tokenizer, samples=None, **changes):
    samples = samples or list(read_samples([GOLDEN / "shard.protos"]))
    return SemanticDataset(samples, tokenizer, **{"max_length": 512, **changes})


def keys(indices):
    return [SampleKey(0, index, len(indices), 0) for index in indices]


def test_items_and_their_batch_equal_the_reference(tokenizer):
    data = dataset(tokenizer)
    golden = golden_tensors("train_step.pt")
    by_length = {tuple(item["tokens"].shape): item for item in golden["items"]}
    assert len(by_length) == 4
    items = [data[key] for key in keys(range(4))]
    for item in items:
        expected = by_length[tuple(item["tokens"].shape)]
        assert torch.equal(item["tokens"], expected["tokens"])
        # The reference's collator, not its items, ignores the codes of <|im_end|>.
        expected["labels"][1:, -1] = IGNORE_INDEX
        assert torch.equal(item["labels"], expected["labels"])
    lengths = [item["tokens"].shape[1] for item in golden["items"]]
    items.sort(key=lambda item: lengths.index(item["tokens"].shape[1]))
    batch = collate(items, tokenizer.end_of_text_id)
    assert torch.equal(batch["tokens"], golden["batch"]["inputs"])
    assert torch.equal(batch["labels"], golden["batch"]["labels"])
    assert torch.equal(batch["key_padding_mask"], golden["batch"]["attention_masks"])


def test_the_labels_of_a_step_are_counted_rightly(tokenizer):
    data = dataset(tokenizer)
    frames = sum(data.num_frames(i) for i in range(4))
    items = [data[SampleKey(0, i, 4, frames)] for i in range(4)]
    batch = collate(items, 0)
    assert batch["step_tokens"] == (batch["labels"][:, 0] != IGNORE_INDEX).sum()
    assert batch["step_frames"] == (batch["labels"][:, 1] != IGNORE_INDEX).sum()


def test_a_step_is_a_pure_function_of_seed_and_position():
    lengths = [5, 9, 2, 7, 3, 8, 4]
    whole = list(itertools.islice(StepBatchSampler(lengths, 2, seed=1, accumulate=2), 40))
    for start in (0, 3, 11):
        resumed = StepBatchSampler(lengths, 2, seed=1, accumulate=2, start_step=start)
        assert list(itertools.islice(resumed, 6)) == whole[2 * start : 2 * start + 6]
    assert list(itertools.islice(StepBatchSampler(lengths, 2, seed=2, accumulate=2), 40)) != whole


def test_every_epoch_shows_every_item_once():
    shown = [
        (key.epoch, key.index)
        for batch in itertools.islice(StepBatchSampler([1] * 10, 2, seed=0), 15)
        for key in batch
    ]
    assert sorted(shown) == [(epoch, index) for epoch in range(3) for index in range(10)]


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_a_step_holds_the_same_items_however_it_is_split(batch_size, accumulate, world):
    lengths = list(range(3, 16))
    whole = itertools.islice(StepBatchSampler(lengths, 4, seed=0), 8)
    parts = [
        itertools.islice(
            StepBatchSampler(
                lengths, batch_size, seed=0, accumulate=accumulate, rank=rank, world_size=world
            ),
            8 * accumulate,
        )
        for rank in range(world)
    ]
    parts = [list(part) for part in parts]
    for step, expected in enumerate(whole):
        got = [
            key
            for part in parts
            for batch in part[step * accumulate : (step + 1) * accumulate]
            for key in batch
        ]
        assert sorted(got) == sorted(expected)


def test_items_of_a_batch_are_of_about_the_same_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, 401).tolist()
    batches = itertools.islice(StepBatchSampler(lengths, 4, seed=0), 500)  # five epochs
    spread = [max(x) - min(x) for x in ([lengths[d.index] for d in batch] for batch in batches)]
    assert np.mean(spread) < 100


def samples_of(speaker, count):
    rng = np.random.default_rng(0)
    return [
        Sample(
            f"text {i}", speaker, rng.integers(0, 1000, (8, 6)).astype(np.uint16), f"{speaker}/{i}"
        )
        for i in range(count)
    ]


def test_a_reference_is_another_utterance_of_the_same_speaker(tokenizer):
    samples = samples_of("Ann", 5) + samples_of("Bob", 5)
    data = dataset(tokenizer, samples, reference_share=1.0, name_speakers=True)
    for index, sample in enumerate(samples):
        text = tokenizer.decode(data[SampleKey(0, index, 1, 0)]["tokens"][0].tolist())
        assert text.count("<|im_start|>user\n") == 2
        assert text.count(f"[{sample.speaker}] ") == 2
        assert text.count(f"{sample.text}<|im_end|>") == 1
    again = data[SampleKey(0, 3, 1, 0)]["tokens"]
    assert torch.equal(again, data[SampleKey(0, 3, 1, 0)]["tokens"])


def test_a_share_of_the_items_has_a_reference(tokenizer):
    data = dataset(tokenizer, samples_of("Ann", 20), reference_share=0.3)
    plain = min(data[SampleKey(0, i, 1, 0)]["tokens"].shape[1] for i in range(20))
    longer = sum(
        data[SampleKey(epoch, i, 1, 0)]["tokens"].shape[1] > plain + 20
        for epoch in range(10)
        for i in range(20)
    )
    assert 35 < longer < 85


def test_what_is_too_long_is_left_out_and_named(tokenizer):
    samples = samples_of("Ann", 2)
    codes = np.zeros((8, 500), np.uint16)
    data = dataset(tokenizer, [*samples, Sample("long", "Ann", codes, "Ann/long")])
    assert len(data) == 2
    assert data.too_long == ["Ann/long"]
    longest = max(data[SampleKey(0, i, 1, 0)]["tokens"].shape[1] for i in range(2))
    assert longest <= max(data.num_positions(i) for i in range(2))
