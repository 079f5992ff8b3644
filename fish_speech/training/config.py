"""A run's config: composed from `configs/`, typed, checked, and remembered by the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import MISSING, DictConfig, OmegaConf

from fish_speech.hub import model_versions
from fish_speech.models.text2semantic.lora import LoRAConfig
from fish_speech.training.optimizer import SCHEDULES, OptimizerConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_FILE = "text2semantic_finetune"
_GROUPS = {"model_version": "model", "lora_config": "lora"}  # by flag
_KEYS = {
    "max_steps": "train.max_steps",
    "batch_size": "data.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "save_every": "train.save_every",
    "val_every": "train.val_every",
    "keep_checkpoints": "train.keep_checkpoints",
    "num_workers": "data.num_workers",
    "seed": "seed",
    "device": "device",
    "precision": "precision",
    "devices": "train.devices",
    "num_nodes": "train.num_nodes",
    "strategy": "train.strategy",
}


@dataclass
class DataConfig:
    dir: str | None = None
    validation_share: float = MISSING
    reference_share: float = MISSING
    max_length: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class TrainConfig:
    max_steps: int = MISSING
    gradient_accumulation_steps: int = MISSING
    gradient_clip: float = MISSING
    gradient_checkpointing: Any = MISSING  # auto, true or false
    cuda_graphs: bool = MISSING
    dropout: float = MISSING
    save_every: int = MISSING
    val_every: int | None = None
    keep_checkpoints: int | None = None
    log_every: int = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING


@dataclass
class AdapterConfig:
    r: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    targets: list[str] = MISSING


@dataclass
class RunConfig:
    """`configs/text2semantic_finetune.yaml`, whose comments say what each key means."""

    project: str = MISSING
    seed: int = MISSING
    device: str = MISSING
    precision: str = MISSING
    base_model: str | None = None
    model: dict[str, Any] = MISSING
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def base(self) -> str:
        """The base model: a directory, or the name of a registered version."""
        return self.base_model or self.model["name"]

    @property
    def adapters(self) -> LoRAConfig:
        lora = self.lora
        return LoRAConfig(lora.r, lora.alpha, lora.dropout, tuple(lora.targets))

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.structured(self))


def compose_config(
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    remembered: Path | None = None,
) -> RunConfig:
    """Compose `configs/text2semantic_finetune.yaml` with hydra `overrides` and plain `values`.

    With `remembered`, the config that a run kept, everything that is not given here is as it was
    there. Raises `ValueError` for a key that there is not and a value that can't be meant.
    """
    values = values or {}
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose(_FILE, overrides=list(overrides))
        for key, value in values.items():
            OmegaConf.update(composed, key, value)
        if remembered is not None:
            given = [*(text.partition("=")[0].lstrip("+") for text in overrides), *values]
            known = _load_saved(remembered)
            for key in given:
                OmegaConf.update(known, key, OmegaConf.select(composed, key), merge=False)
            # A setting that came after the run is as composed; of two models nothing is mixed.
            OmegaConf.set_struct(composed, False)
            composed.model = known.model
            composed = OmegaConf.merge(composed, known)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed))
    except Exception as error:  # hydra's grammar raises half a dozen unrelated kinds
        if remembered is not None and str(error).startswith(str(remembered)):
            raise
        key = getattr(error, "full_key", None)
        what = str(error).strip().splitlines()[0].rstrip(".")
        hint = (
            f" (--override KEY=VALUE, with the keys of {CONFIGS.name}/{_FILE}.yaml)"
            if overrides
            else ""
        )
        raise ValueError(f"config: {f'{key}: ' if key else ''}{what}{hint}") from error
    _check_ranges(config)
    return config


def _load_saved(file: Path) -> DictConfig:
    """A config that a run kept. Raises `ValueError` that names the file where it is damaged."""
    try:
        known = OmegaConf.load(file)
        if not isinstance(known, DictConfig):
            raise ValueError("no map")
        if missing := {f.name for f in fields(RunConfig)} - known.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        known.optimizer.pop("max_steps", None)  # which earlier versions wrote, for nothing
        return known
    except Exception as error:  # YAML's and OmegaConf's errors have nothing in common
        what = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file}: damaged ({what}); delete it, and the settings in the checkpoint count"
        ) from error


def config_of_flags(
    flags: Mapping[str, Any], data_dir: Path | None, remembered: Path | None = None
) -> RunConfig:
    """The config of `finetune_tts.py`'s flags (None: not given), as `compose_config` makes it."""
    for flag, known in (("lora_config", lora_presets()), ("model_version", list(model_versions()))):
        if flags[flag] is not None and flags[flag] not in known:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} {flags[flag]}: one of {', '.join(known)}")
    overrides = [f"{group}='{flags[flag]}'" for flag, group in _GROUPS.items() if flags[flag]]
    values = {key: flags[flag] for flag, key in _KEYS.items() if flags[flag] is not None}
    values |= {"project": flags["project"], "data.dir": data_dir and str(data_dir)}
    if flags["pretrained_ckpt_path"] is not None:
        values["base_model"] = str(flags["pretrained_ckpt_path"])
    elif flags["model_version"] is not None:
        values["base_model"] = None
    return compose_config([*overrides, *flags["override"]], values, remembered=remembered)


def lora_presets() -> list[str]:
    """Names of the LoRA configs."""
    return sorted(file.stem for file in (CONFIGS / "lora").glob("*.yaml"))


_AT_LEAST_ONE = (
    *("train.max_steps", "train.gradient_accumulation_steps", "train.save_every"),
    *("train.val_every", "train.log_every", "train.keep_checkpoints", "train.devices"),
    *("train.num_nodes", "data.batch_size", "data.max_length"),
)
_MOST = 1_000_000_000  # of what is counted
_AT_LEAST_ZERO = (
    *("train.gradient_clip", "data.num_workers", "optimizer.warmup_steps", "optimizer.eps"),
    "optimizer.weight_decay",
)
_SHARES = (
    *("data.validation_share", "data.reference_share"),
    *("optimizer.decay_share", "optimizer.final_share"),
)


def _check_ranges(config: RunConfig) -> None:
    for least, keys in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and not least <= value <= _MOST:
                raise ValueError(f"config: {key} is {value}; it must be {least} to {_MOST:.0e}")
    if not 0 <= config.seed < 1 << 63:
        raise ValueError(f"config: seed is {config.seed}; it must be from 0 to below 2^63")
    for key in ("optimizer.learning_rate", "lora.alpha"):
        value = attrgetter(key)(config)
        if not 0 < value < math.inf:
            raise ValueError(f"config: {key} is {value}; it must be above 0, and a number")
    for key in _SHARES:
        if not 0 <= attrgetter(key)(config) <= 1:
            raise ValueError(f"config: {key} is {attrgetter(key)(config)}, not 0 to 1")
    for key in ("lora.dropout", "train.dropout"):
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            raise ValueError(f"config: {key} is {value}; it must be from 0 to below 1")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"config: optimizer.betas is {list(betas)}; it must be two numbers from 0 to below 1"
        )
    schedule, strategy = config.optimizer.schedule, config.train.strategy
    if schedule not in SCHEDULES:
        raise ValueError(
            f"config: optimizer.schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}"
        )
    if not _is_strategy(strategy):
        raise ValueError(
            f"config: train.strategy is {strategy!r}, none of Lightning's; use auto or ddp"
        )
    device, cards = config.device, config.train.devices
    if device.startswith("cuda:") and cards > 1:
        raise ValueError(
            f"--device {device} is one card and --devices {cards} are several: give --device cuda, "
            "or --devices 1"
        )
    if str(config.train.gradient_checkpointing).lower() not in ("auto", "true", "false"):
        raise ValueError(
            f"config: train.gradient_checkpointing is {config.train.gradient_checkpointing!r}; "
            "use auto, true or false"
        )
    config.adapters  # noqa: B018 (its own checks)


def _is_strategy(name: str) -> bool:
    if name in ("auto", "ddp"):
        return True
    from lightning.pytorch.strategies import StrategyRegistry  # seconds, for whoever wants others

    return name in StrategyRegistry.available_strategies()
