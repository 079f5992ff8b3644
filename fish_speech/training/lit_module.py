"""The Lightning module: loss, optimizer and what a checkpoint of a run carries."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from fish_speech.devices import seed_rng, to_device_async, to_host_async
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.lora import load_lora, lora_state_dict
from fish_speech.resources import peak_memory
from fish_speech.training.loss import LabelPositions, loss_metrics, loss_sums
from fish_speech.training.optimizer import OptimizerConfig
from fish_speech.training.step_graphs import StepGraphs


class DivergedError(ValueError):
    """The loss at a step is no finite number."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class _StepMetrics(NamedTuple):
    """Of one optimizer step: its clips, its learning rate, and the tokens that the run has seen.
    `read` waits for the device, and returns the loss sums and the gradient norm [6]."""

    step: int
    clips: list[str]
    learning_rate: float
    tokens: int
    read: Callable[[], Tensor]


class TextToSemantic(L.LightningModule):
    """Trains what requires gradients: adapters over a frozen base, or every parameter.

    `run` is stored in every checkpoint (LoRA config, base, data, parent); `clip_names` are those of
    the dataset's samples. All randomness of a step follows from `seed` and the step, so a resumed
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
        self.metrics: dict[str, float] = {}  # of the last step that was flushed
        self.adapters_only = bool(lora_state_dict(model))
        self.strict_loading = not self.adapters_only
        # Loss sums over the micro-batches of the current step, and over the current validation.
        self._step_sums: Tensor | int = 0
        self._validation_sums: Tensor | int = 0
        self._step_clips: list[str] = []
        self._pending: deque[_StepMetrics] = deque()
        self._unlogged_step: int | None = None  # flushed, but not logged
        self._started, self._num_tokens = 0.0, 0

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """What the model takes, on its device, and what Python reads, which would wait for one."""
        codes = batch["step_frames"] * self.model.config.num_codebooks
        positions = LabelPositions.from_labels(batch["labels"])
        return {
            "tokens": to_device_async(batch["tokens"], device),
            "positions": LabelPositions(*(to_device_async(part, device) for part in positions)),
            "step_labels": to_device_async(torch.stack([batch["step_tokens"], codes]), device),
            "indices": batch["indices"].tolist(),
            "num_tokens": int((~batch["key_padding_mask"]).sum()),
        }

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        micro = batch_index % self.trainer.accumulate_grad_batches
        self._record_batch(batch, micro)
        self._seed_step(micro)
        tokens, positions, labels = batch["tokens"], batch["positions"], batch["step_labels"]
        made = self.graphs and self.graphs(tokens, positions, 1 / labels)
        if made is None:
            sums = loss_sums(self.model, tokens, positions, bucketed=True)
            made = sums.loss(*labels), sums
        loss, sums = made
        self._step_sums = sums.totals() + (self._step_sums if micro else 0)
        # Lightning divides by the micro-batches and averages over processes; the sums are already
        # parts of the whole step's mean.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm, and queue the metrics of the step."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
        totals = self.trainer.strategy.reduce(self._step_sums, reduce_op="sum")
        read = to_host_async(torch.cat([totals, norm.detach().float()[None]]))
        rate = optimizer.param_groups[0]["lr"]
        self._pending.append(
            _StepMetrics(self.global_step, self._step_clips, rate, self._num_tokens, read)
        )
        self.flush_metrics(keep_last=self._deferred_steps())

    def _deferred_steps(self) -> int:
        """Steps whose metrics are read later: on one GPU it computes the last one while Python
        prepares the next. Whoever saves or validates flushes them before."""
        alone = self.trainer.world_size == 1
        return int(alone and self.device.type == "cuda")

    def flush_metrics(self, keep_last: int = 0) -> None:
        """Log the metrics of the steps so far, except the last ones.

        Raises `ValueError` where one is not finite: the adapters are NaN, or would be.
        """
        while len(self._pending) > keep_last:
            step = self._pending.popleft()
            *totals, norm = step.read().tolist()
            self._check_finite(step, totals[0] + totals[1], "loss")
            self._check_finite(step, norm, "gradient")
            if norm == 0:  # as where all logits are the same; every process has this norm
                message = f"the gradient is 0 at step {step.step}: the training has diverged"
                raise DivergedError(f"{message}; lower --learning-rate", step.step)
            metrics = loss_metrics(totals) | {
                "gradient_norm": norm,
                "learning_rate": step.learning_rate,
                "tokens_per_second": step.tokens / (time.monotonic() - self._started),
                "memory_gb": peak_memory(self.device) / 1e9,
            }
            self.metrics = {f"train/{name}": value for name, value in metrics.items()}
            self._unlogged_step = step.step
            if (step.step + 1) % self.trainer.log_every_n_steps == 0:
                self._log()

    def _log(self) -> None:
        if self._unlogged_step is not None:
            for logger in self.trainer.loggers:
                logger.log_metrics(self.metrics, self._unlogged_step)
                logger.save()
        self._unlogged_step = None

    def _check_finite(self, step: _StepMetrics, value: float, what: str) -> None:
        """All processes stop where one of them would go on with nonsense."""
        fine = math.isfinite(value)
        if self.trainer.strategy.reduce_boolean_decision(fine, all=True):
            return
        message = (
            f"the {what} is {value} at step {step.step}, in {', '.join(step.clips)}; "
            "look at these clips, or lower --learning-rate"
        )
        raise DivergedError(message, step.step) if what == "loss" else ValueError(message)

    def _record_batch(self, batch: dict[str, Any], micro: int) -> None:
        names = self.clip_names or {i: f"sample {i}" for i in batch["indices"]}
        clips = [names[i] for i in batch["indices"]]
        self._step_clips = clips if micro == 0 else self._step_clips + clips
        # One process counts for all: its tokens are as good as any's.
        self._num_tokens += batch["num_tokens"] * self.trainer.world_size

    def on_train_batch_end(self, outputs, batch: dict[str, Tensor], batch_index: int) -> None:
        # Where it stops, Lightning validates: the last step is to have its loss whatever the
        # interval. (After the callbacks, one of which may have put an end to validation.)
        self.trainer.should_stop |= self.global_step == self.trainer.max_steps

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        sums = loss_sums(self.model, batch["tokens"], batch["positions"], bucketed=True)
        self._validation_sums = sums.totals() + self._validation_sums

    def on_validation_start(self) -> None:
        self.flush_metrics()

    def on_validation_epoch_end(self) -> None:
        totals, self._validation_sums = self._validation_sums, 0
        if not bool(totals[:2].sum().isfinite()):  # in every process: each saw all
            step = self.global_step
            raise DivergedError(
                f"the validation loss is {totals[:2].sum().item()} at step {step}; "
                "lower --learning-rate",
                step,
            )
        metrics = {f"validation/{name}": value for name, value in loss_metrics(totals).items()}
        self.log_dict(metrics, rank_zero_only=True)

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
        self._started = time.monotonic()
        # A resumed optimizer has come with the settings that it was saved with.
        wanted = self.configure_optimizers().param_groups
        for group, fresh in zip(self.trainer.optimizers[0].param_groups, wanted, strict=True):
            group.update({name: fresh[name] for name in ("weight_decay", "betas", "eps")})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.optimizer_config.learning_rate_at(self.global_step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_train_end(self) -> None:
        self.flush_metrics()
        self._log()  # the last step, whatever the interval

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.flush_metrics()
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
