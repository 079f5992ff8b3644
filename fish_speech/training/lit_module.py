"""The Lightning module: loss, optimizer and what a checkpoint of a run carries."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from fish_speech.devices import seed_rng, to_device_async, to_host_async
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.lora import load_lora, lora_state_dict
from fish_speech.resources import peak_memory
from fish_speech.training.loss import Places, loss_figures, loss_sums
from fish_speech.training.step_graphs import StepGraphs

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
    max_steps: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step (the first is 0): a pure function, so nothing to resume."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate * warm
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: '{self.schedule}' is none of {', '.join(SCHEDULES)}")
        start = self.warmup_steps
        if self.schedule == "wsd":
            start = max(start, round(self.max_steps * (1 - self.decay_share)))
        span = max(1, self.max_steps - start)
        progress = min(1.0, max(0.0, (step - start) / span))
        fall = 1 - progress if self.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * warm * (self.final_share + (1 - self.final_share) * fall)


class DivergedError(ValueError):
    """The loss at a step is no finite number."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class _Taken(NamedTuple):
    """A step that was taken, with its learning rate, the columns learned from up to it, and what a
    device may still be at: `totals` of its losses and the norm of its gradient [6]."""

    step: int
    clips: list[str]
    rate: float
    columns: int
    read: Callable[[], Tensor]


class TextToSemantic(L.LightningModule):
    """Trains what requires gradients: adapters over a frozen base, or every parameter.

    `run` is stored in every checkpoint (LoRA config, base, data, parent); `clip_names` are those of
    the data set's samples. All randomness of a step follows from `seed` and the step, so a resumed
    run draws what an uninterrupted one would have drawn.
    """

    def __init__(
        self,
        model: DualARTransformer,
        optimizer: OptimizerConfig,
        *,
        seed: int = 0,
        run: dict[str, Any] | None = None,
        clip_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.seed = seed
        self.run, self.clip_names = run or {}, clip_names
        self.graphs: StepGraphs | None = None
        self.figures: dict[str, float] = {}  # of the last step that was looked at, as it is logged
        self.adapters_only = bool(lora_state_dict(model))
        self.strict_loading = not self.adapters_only
        # Added up: of the step at hand (whose last batch alone holds its longest clips), and of the
        # validation at hand.
        self._step: Tensor | int = 0
        self._validation: Tensor | int = 0
        self._clips: list[str] = []  # of the step at hand
        self._taken: deque[_Taken] = deque()
        self._unlogged: int | None = None  # the last step that was looked at, if it isn't logged
        self._since, self._columns = 0.0, 0  # when it began, and what it has learned from

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """What the model takes, on its device, and what Python reads, which would wait for one."""
        codes = batch["step_frames"] * self.model.config.num_codebooks
        return {
            "tokens": to_device_async(batch["tokens"], device),
            "places": Places(
                *(to_device_async(part, device) for part in Places.of(batch["labels"]))
            ),
            "step_labels": to_device_async(torch.stack([batch["step_tokens"], codes]), device),
            "indices": batch["indices"].tolist(),
            "columns": int((~batch["key_padding_mask"]).sum()),
        }

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        micro = batch_index % self.trainer.accumulate_grad_batches
        self._note(batch, micro)
        self._seed_step(micro)
        tokens, places, labels = batch["tokens"], batch["places"], batch["step_labels"]
        made = self.graphs and self.graphs(tokens, places, 1 / labels)
        if made is None:
            sums = loss_sums(self.model, tokens, places, fill_up=True)
            made = sums.loss(*labels), sums
        loss, sums = made
        self._step = sums.totals() + (self._step if micro else 0)
        # Lightning divides by the micro-batches and averages over processes; the sums are already
        # parts of the whole step's mean.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm, and note what the step has made."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
        totals = self.trainer.strategy.reduce(self._step, reduce_op="sum")
        read = to_host_async(torch.cat([totals, norm.detach().float()[None]]))
        rate = optimizer.param_groups[0]["lr"]
        self._taken.append(_Taken(self.global_step, self._clips, rate, self._columns, read))
        self.look(but=self._unseen())

    def _unseen(self) -> int:
        """Steps whose figures are left to the next one: a card is at them while Python prepares
        that. Who keeps what a step has made, or goes by it, looks before."""
        alone = self.trainer.world_size == 1
        return int(alone and self.device.type == "cuda")

    def look(self, but: int = 0) -> None:
        """Log what the steps have made, the last ones left out.

        Raises `ValueError` where that is no finite number: the adapters are NaN, or would be.
        """
        while len(self._taken) > but:
            taken = self._taken.popleft()
            *totals, norm = taken.read().tolist()
            self._refuse_unless_finite(taken, totals[0] + totals[1], "loss")
            self._refuse_unless_finite(taken, norm, "gradient")
            figures = loss_figures(totals) | {
                "gradient_norm": norm,
                "learning_rate": taken.rate,
                "tokens_per_second": taken.columns / (time.monotonic() - self._since),
                "memory_gb": peak_memory(self.device) / 1e9,
            }
            self.figures = {f"train/{name}": value for name, value in figures.items()}
            self._unlogged = taken.step
            if (taken.step + 1) % self.trainer.log_every_n_steps == 0:
                self._log()

    def _log(self) -> None:
        if self._unlogged is not None:
            for logger in self.trainer.loggers:
                logger.log_metrics(self.figures, self._unlogged)
                logger.save()
        self._unlogged = None

    def _refuse_unless_finite(self, taken: _Taken, value: float, what: str) -> None:
        """All processes stop where one of them would go on with nonsense."""
        fine = math.isfinite(value)
        if self.trainer.strategy.reduce_boolean_decision(fine, all=True):
            return
        message = (
            f"the {what} is {value} at step {taken.step}, in {', '.join(taken.clips)}; "
            "look at these clips, or lower --learning-rate"
        )
        raise DivergedError(message, taken.step) if what == "loss" else ValueError(message)

    def _note(self, batch: dict[str, Any], micro: int) -> None:
        names = self.clip_names or {i: f"sample {i}" for i in batch["indices"]}
        clips = [names[i] for i in batch["indices"]]
        self._clips = clips if micro == 0 else self._clips + clips
        # One process counts for all: its part of the columns is as good as any.
        self._columns += batch["columns"] * self.trainer.world_size

    def on_train_batch_end(self, outputs, batch: dict[str, Tensor], batch_index: int) -> None:
        # Where it stops, Lightning validates: the last step is to have its loss whatever the
        # interval. (After the callbacks, one of which may have put an end to validation.)
        self.trainer.should_stop |= self.global_step == self.trainer.max_steps

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        sums = loss_sums(self.model, batch["tokens"], batch["places"], fill_up=True)
        self._validation = sums.totals() + self._validation

    def on_validation_start(self) -> None:
        self.look()

    def on_validation_epoch_end(self) -> None:
        totals, self._validation = self._validation, 0
        if not bool(totals[:2].sum().isfinite()):  # in every process: each saw all
            step = self.global_step
            raise DivergedError(
                f"the validation loss is {totals[:2].sum().item()} at step {step}; "
                "lower --learning-rate",
                step,
            )
        figures = {f"validation/{name}": value for name, value in loss_figures(totals).items()}
        self.log_dict(figures, rank_zero_only=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.optimizer_config
        # Norms and biases are not decayed.
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def on_train_start(self) -> None:
        self._since = time.monotonic()
        # A resumed optimizer has come with the settings that it was saved with.
        wanted = self.configure_optimizers().param_groups
        for group, fresh in zip(self.trainer.optimizers[0].param_groups, wanted, strict=True):
            group.update({name: fresh[name] for name in ("weight_decay", "betas", "eps")})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.optimizer_config.rate(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_train_end(self) -> None:
        self.look()
        self._log()  # the last step, whatever the interval

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.look()
        checkpoint["run"] = self.run
        if self.adapters_only:
            adapters = lora_state_dict(self.model)
            checkpoint["state_dict"] = {f"model.{key}": value for key, value in adapters.items()}

    def load_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ):
        """Adapters are loaded over the frozen base; anything else must be the whole model."""
        if self.adapters_only:
            load_lora(self.model, state_dict, "the checkpoint")
            return None
        return super().load_state_dict(state_dict, strict=True, assign=assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the beginning of a step: it may be cut into other micro-batches than before."""
        steps, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        batches = steps * self.trainer.accumulate_grad_batches
        # As if saved at the end of the step's last batch, wherever it was: only then Lightning
        # completes both counts itself, so that the logs count on without a gap.
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1

    def _seed_step(self, micro: int) -> None:
        place = (self.global_step * 4096 + micro) * self.trainer.world_size + self.global_rank
        seed_rng((self.seed * 1_000_003 + place) % (1 << 63), self.device)
