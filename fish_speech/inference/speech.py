"""Settings of synthesis, and the pieces in which speech is returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How codes are sampled. The defaults are those published with the model.

    `temperature` 0 takes the most likely code. `window` is the number of frames that the
    repetition penalty looks back, in each row by itself.
    """

    temperature: float = 0.7
    top_p: float = 0.7
    repetition_penalty: float = 1.2
    window: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature must be 0 or more (is {self.temperature})")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1 (is {self.top_p})")
        if not 0 < self.repetition_penalty < inf:
            raise ValueError(f"repetition penalty must be above 0 (is {self.repetition_penalty})")


@dataclass(frozen=True)
class Settings:
    """How to speak; the defaults are the published ones.

    `seed` decides every sample: the same seed, text and model give the same speech. A chunk whose
    speech does not end in the time that its text can take is tried again, `retries` times, with
    another seed derived from `seed`. `max_new_tokens` (frames a chunk) replaces that bound.
    `context_tokens` is the room in the prompt for chunks that were already spoken. `drawing` is the
    version of the sampler: it is raised whenever a seed gives other speech than before, so that no
    batch or evaluation mixes both.
    """

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None
    retries: int = 2
    context_tokens: int = 1024
    drawing: int = field(default=5, init=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1 (is {self.max_new_tokens})")
        if self.retries < 0:
            raise ValueError(f"retries must not be negative (is {self.retries})")


@dataclass(frozen=True)
class Piece:
    """A stretch of speech as it is made: `waveform [1, n]`, of chunk `index` of `count`.

    `frames` counts the codec frames in it, `ends_chunk` marks a chunk's last piece, and `problem`
    then says what went wrong with the chunk, where something did; `ran_on` if it did not end,
    `lost` if nothing of it was spoken.
    """

    waveform: Tensor
    index: int
    count: int
    frames: int
    ends_chunk: bool = False
    problem: str | None = None
    ran_on: bool = False
    lost: bool = False
