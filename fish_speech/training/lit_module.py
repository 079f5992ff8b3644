"""The Lightning module: loss, optimizer and what a checkpoint of a run carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.lora import load_lora, lora_state_dict
from fish_speech.training.loss import LossSums, loss_sums


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over the steps.

    The rate rises over `warmup_steps`, then stays (`schedule` "constant") or falls along a cosine
    to `final_share` of it at `max_steps` ("cosine").
    """

    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: str = "constant"
    final_share: float = 0.0
    max_steps: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step (the first is 0): a pure function, so nothing to resume."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate * warm
        if self.schedule != "cosine":
            raise ValueError(f"schedule: '{self.schedule}' is neither 'constant' nor 'cosine'")
        span = max(1, self.max_steps - self.warmup_steps)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / span))
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * warm * (self.final_share + (1 - self.final_share) * fall)


class TextToSemantic(L.LightningModule):
    """Trains what requires gradients: adapters over a frozen base, or every parameter.

    `run` is stored in every checkpoint (LoRA config, base, data, parent); `clip_names` are those of
    the data set's samples.
    `code_noise` replaces that share of the input codes by random ones; `frame_share` trains the
    fast transformer on that share of the frames. All randomness of a step follows from `seed` and
    the step, so a resumed run draws what an uninterrupted one would have drawn.
    """

    def __init__(
        self,
        model: DualARTransformer,
        optimizer: OptimizerConfig,
        *,
        seed: int = 0,
        code_noise: float = 0.0,
        frame_share: float = 1.0,
        run: dict[str, Any] | None = None,
        clip_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.seed, self.code_noise, self.frame_share = seed, code_noise, frame_share
        self.run, self.clip_names = run or {}, clip_names
        self.adapters_only = bool(lora_state_dict(model))
        self.strict_loading = not self.adapters_only
        self._validation: list[LossSums] = []

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        generator = self._seed_step(batch_index)
        sums = loss_sums(
            self.model,
            self._with_noise(batch["tokens"], generator),
            batch["labels"],
            frame_share=self.frame_share,
            generator=generator,
        )
        step_codes = batch["step_frames"] * self.model.config.num_codebooks * self.frame_share
        # Lightning divides by the micro-batches and averages over processes; the sums are already
        # parts of the whole step's mean.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        loss = sums.loss(batch["step_tokens"], step_codes) * parts
        if not loss.isfinite():
            names = self.clip_names or range(10**9)
            clips = [str(names[i]) for i in batch["indices"].tolist()]
            raise ValueError(
                f"the loss is {loss.item()} at step {self.global_step}, in {', '.join(clips)}; "
                "look at these clips, or lower --learning-rate; the last checkpoint is good"
            )
        self.log_dict(
            {
                "train/loss": loss.detach(),
                "train/token_loss": sums.token.detach() / max(1, sums.tokens),
                "train/codebook_loss": sums.codebook.detach() / max(1, sums.codes),
                "train/top5_accuracy": sums.top5 / max(1, sums.codes),
            }
        )
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._validation.append(loss_sums(self.model, batch["tokens"], batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        sums = self._validation
        self._validation = []
        totals = torch.stack(
            [torch.stack([s.token, s.codebook, s.top5.to(s.token.dtype)]).float() for s in sums]
        ).sum(0)
        tokens, codes = sum(s.tokens for s in sums), sum(s.codes for s in sums)
        token, codebook = totals[0] / tokens, totals[1] / codes
        self.log_dict(
            {
                "validation/loss": token + codebook,
                "validation/token_loss": token,
                "validation/codebook_loss": codebook,
                "validation/top5_accuracy": totals[2] / codes,
            },
            rank_zero_only=True,
        )

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
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.optimizer_config.rate(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.log("train/learning_rate", rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
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

    def _seed_step(self, batch_index: int) -> torch.Generator:
        """Seed what the step draws: dropout from the global state, the rest from the generator."""
        micro = batch_index % self.trainer.accumulate_grad_batches
        place = (self.global_step * 64 + micro) * self.trainer.world_size + self.global_rank
        seed = (self.seed * 1_000_003 + place) % (1 << 63)
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def _with_noise(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        if not self.code_noise:
            return tokens
        codes = tokens[:, 1:]
        noise = torch.randint(self.model.config.codebook_size, codes.shape, generator=generator).to(
            codes.device
        )
        hit = torch.rand(codes.shape, generator=generator).to(codes.device) < self.code_noise
        hit &= self.model.is_frame(tokens[:, :1])
        return torch.cat([tokens[:, :1], torch.where(hit, noise, codes)], dim=1)
