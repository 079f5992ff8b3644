"""Composing a run's config from `configs/` and the overrides of a command line."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def compose_config(overrides: list[str], name: str = "text2semantic_finetune") -> DictConfig:
    """Compose `configs/<name>.yaml` with hydra overrides (`key=value`).

    Raises `ValueError` for a key that the config does not have.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from error


def lora_presets() -> list[str]:
    """Names of the LoRA configs."""
    return sorted(file.stem for file in (CONFIGS / "lora").glob("*.yaml"))
