"""The optimizer's settings, and its learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "wsd", "cosine")


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate over the steps.

    The rate rises over `warmup_steps`, then stays (`schedule` "constant"), stays until it falls in
    a straight line over the last `decay_share` of the steps ("wsd": warmup, stable, decay), or
    falls along a cosine ("cosine"); where it falls, to `final_share` of it at `max_steps`.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: str = "constant"
    decay_share: float = 0.2
    final_share: float = 0.0

    def learning_rate_at(self, step: int, max_steps: int) -> float:
        """The learning rate of a step (the first is 0): a pure function, so nothing to resume."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate * warm
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: '{self.schedule}' is none of {', '.join(SCHEDULES)}")
        start = self.warmup_steps
        if self.schedule == "wsd":
            start = max(start, round(max_steps * (1 - self.decay_share)))
        span = max(1, max_steps - start)
        progress = min(1.0, max(0.0, (step - start) / span))
        fall = 1 - progress if self.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * warm * (self.final_share + (1 - self.final_share) * fall)
