import pytest
import torch

from fish_speech.inference.generate import PrefixCache, generate
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic.decode.packed import pack
from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora, load_lora, merge_lora
from tests.conftest import golden_tensors

IM_END = 404


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("generate.pt")


def run(model, prompt, **changes):
    """All frames [K, T], and whether the speech ended by itself."""
    options = {"im_end_id": IM_END, "max_new_tokens": 40, "sampling": Sampling(0, 1, 1), **changes}
    frames, generation = [], generate(model, prompt.long(), **options)
    while True:
        try:
            frames.append(next(generation))
        except StopIteration as end:
            return torch.stack(frames, dim=1), end.value


@torch.no_grad()
def test_one_step_equals_the_reference(model, golden):
    hidden = model.hidden_states(golden["prompt"].long()[None])[:, -1:]
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(hidden, golden["prefill_hidden"], **tolerance)
    torch.testing.assert_close(model.token_logits(hidden), golden["prefill_logits"], **tolerance)


@pytest.mark.parametrize("kind", ["greedy", "greedy_rep"])
def test_greedy_continuations_equal_the_reference(model, golden, kind):
    case = golden["gen"][kind]
    sampling = Sampling(temperature=0, top_p=1, repetition_penalty=case["repetition_penalty"])
    frames, ended = run(model, golden["prompt"], sampling=sampling)
    expected = case["sequence"][1:, golden["prompt"].shape[1] :].long()
    ends = (case["sequence"][0, golden["prompt"].shape[1] :] == IM_END).nonzero()
    if len(ends):
        expected = expected[:, : ends[0, 0]]
    assert torch.equal(frames, expected)
    assert ended == bool(len(ends))


def test_the_seed_decides(model, golden):
    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature=1, top_p=0.9)
        return run(model, golden["prompt"], sampling=sampling, generator=generator)[0]

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1)[:, :5], sampled(2)[:, :5])


def test_what_was_read_and_said_is_not_read_again(model, golden, monkeypatch):
    prompt = golden["prompt"].long()
    frames, _ = run(model, prompt, max_new_tokens=12)
    said = torch.cat([frames[:1] + model.semantic_begin_id, frames])
    later = torch.cat([prompt, said, prompt[:, :9]], dim=1)
    expected, _ = run(model, later, max_new_tokens=6)

    read, plain = [], model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda x, **options: read.append(x.shape[2]) or plain(x, **options)
    )
    cache = PrefixCache(model)
    assert torch.equal(run(model, prompt, max_new_tokens=12, prefix_cache=cache)[0], frames)
    assert torch.equal(run(model, prompt, max_new_tokens=12, prefix_cache=cache)[0], frames)
    assert torch.equal(run(model, later, max_new_tokens=6, prefix_cache=cache.copy())[0], expected)
    other = golden["prompt"].long()
    other[0, 3] += 1
    alone, _ = run(model, other, max_new_tokens=6)
    assert torch.equal(run(model, other, max_new_tokens=6, prefix_cache=cache)[0], alone)
    longest = [columns for columns in read if columns > 1]
    size = prompt.shape[1]
    # All of it; one column more than is new, for the last frame is never read; two others.
    assert longest == [size, 10, size, size - 3]


def test_generation_uses_unmerged_adapters(model, golden):
    add_lora(model, LoRAConfig())
    load_lora(model, golden_tensors("lora.pt")["lora_ckpt"]["state_dict"], "golden")
    adapted = run(model, golden["prompt"], max_new_tokens=12)[0]
    merge_lora(model)
    assert torch.equal(run(model, golden["prompt"], max_new_tokens=12)[0], adapted)


def test_it_stops_at_the_limit_and_at_the_context(model, golden):
    frames, ended = run(model, golden["prompt"], max_new_tokens=3)
    assert (frames.shape[1], ended) == (3, False)
    full = torch.cat([golden["prompt"]] * 4, dim=1)[:, : model.config.max_seq_len - 2]
    assert run(model, full)[0].shape[1] <= 2
    with pytest.raises(ValueError, match="context is 512"):
        run(model, torch.cat([golden["prompt"]] * 4, dim=1))


@pytest.mark.parametrize(
    "weight",
    [
        *("layers.2.feed_forward.w2.weight", "fast_layers.1.attention.wo.weight"),
        *("fast_output.weight", "output.weight", "norm.weight"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("packed", [None, "int8"])
def test_damaged_weights_say_nothing(model, golden, weight, value, packed):
    with torch.no_grad():
        row = IM_END if weight == "output.weight" else 0
        model.get_parameter(weight)[row].view(-1)[0] = value
    if packed:
        pack(model, packed)
    with pytest.raises(ValueError, match=r"model computes .* no numbers: .*; get it, or merge"):
        run(model, golden["prompt"])
