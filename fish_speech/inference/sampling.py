"""From logits to a code: repetition penalty, then top-p, then temperature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fish_speech.inference.speech import Sampling

_NO_IDS = np.empty(0, np.int64)
_MIN_TEMPERATURE = 1e-5  # logits divided by less overflow


def probabilities(logits: Tensor, previous: Tensor | None, sampling: Sampling) -> Tensor:
    """logits [V] and previous ids [n] (int64, repeats allowed) -> probabilities [V] in fp32."""
    logits = logits.float()
    if previous is not None and len(previous) and sampling.repetition_penalty != 1:
        scores = logits[previous]
        penalty = sampling.repetition_penalty
        scores = torch.where(scores < 0, scores * penalty, scores / penalty)
        logits = logits.scatter(0, previous, scores)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        outside = ordered.softmax(0).cumsum(0) > sampling.top_p
        outside[0] = False  # the most likely always stays
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    return (logits / max(sampling.temperature, _MIN_TEMPERATURE)).softmax(0)


def sample(
    logits: Tensor, previous: Tensor | None, sampling: Sampling, generator: torch.Generator | None
) -> Tensor:
    """Sample one id from logits [V]; returns a scalar (int64)."""
    if logits.device.type == "cpu" and sampling.temperature > 0:
        return _sample_cpu(logits, previous, sampling, generator)
    probs = probabilities(logits, previous, sampling)
    if sampling.temperature == 0:
        return probs.argmax()
    # The largest of `probs` divided by exponential noise is a sample of `probs` (the Gumbel trick).
    # Unlike `multinomial`, this never waits for the device.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax()


def _sample_cpu(
    logits: Tensor, previous: Tensor | None, sampling: Sampling, generator: torch.Generator | None
) -> Tensor:
    from fish_speech.inference.cpu_sampling import sample_id

    seen = _NO_IDS if previous is None else previous.numpy()
    u = 1 - torch.rand((), generator=generator).item()
    penalty, top_p = sampling.repetition_penalty, sampling.top_p
    temperature = max(sampling.temperature, _MIN_TEMPERATURE)
    sampled = sample_id(logits.float().numpy(), seen, penalty, top_p, temperature, u)
    return torch.tensor(sampled)
