import pytest
import torch

from fish_speech.inference.cpu_sampling import sample_id
from fish_speech.inference.sampling import Sampling, probabilities, sample
from tests.conftest import golden_tensors


def test_probabilities_equal_the_reference():
    golden = golden_tensors("generate.pt")
    arguments = golden["probs_args"]
    previous = torch.tensor(arguments.pop("previous_tokens"))
    probs = probabilities(golden["prefill_logits"][0, 0], previous, Sampling(**arguments))
    torch.testing.assert_close(probs, golden["probs"], atol=1e-4, rtol=1e-4)


def test_samples_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])
    sampling = Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    generator = torch.Generator().manual_seed(0)
    sampled = torch.stack([sample(logits, None, sampling, generator) for _ in range(4000)])
    shares = torch.bincount(sampled, minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.03, rtol=0)
    generator = torch.Generator().manual_seed(0)
    again = torch.stack([sample(logits, None, sampling, generator) for _ in range(4000)])
    assert torch.equal(sampled, again)


def test_the_most_likely_always_stays():
    probs = probabilities(torch.tensor([5.0, 0.0, 0.0]), None, Sampling(top_p=0.01))
    assert probs.tolist() == [1.0, 0.0, 0.0]


def test_a_model_that_gives_no_numbers_never_samples_beyond_its_ids():
    for logits in (torch.full((8,), torch.nan), torch.full((8,), torch.inf)):
        assert 0 <= sample(logits, None, Sampling(), None) < 8


def test_the_improbable_is_never_sampled(monkeypatch):
    """Not even by the ends of what a random number can be."""
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf])
    for u, sampled in ((0.0, 2), (1 - 2**-24, 1)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor(u))
        assert sample(logits, None, Sampling(top_p=1), None) == sampled


@pytest.mark.parametrize("size", [5, 1024, 1025])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.2])
def test_what_a_cpu_samples_has_the_same_probabilities(size, temperature, top_p, penalty):
    generator = torch.Generator().manual_seed(size)
    for spread in (0.1, 1.0, 5.0):
        logits = spread * torch.randn(size, generator=generator)
        previous = torch.randint(0, size, (16,), generator=generator)  # some of them twice
        probs = probabilities(logits, previous, Sampling(temperature, top_p, penalty)).double()
        ends = probs.cumsum(0) / probs.sum()
        for u in torch.rand(5, generator=generator).tolist():
            settings = (penalty, top_p, temperature, u)
            sampled = sample_id(logits.numpy(), previous.numpy(), *settings)
            assert probs[sampled] > 0
            assert ends[sampled] - probs[sampled] - 1e-5 < u < ends[sampled] + 1e-5


def test_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([0.1, 0.3, 0.2])
    assert sample(logits, None, Sampling(temperature=0), None) == 1
    assert sample(logits, None, Sampling(temperature=1e-39), None) == 1


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}]
)
def test_impossible_settings_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values)).replace("_", ".")):
        Sampling(**values)
