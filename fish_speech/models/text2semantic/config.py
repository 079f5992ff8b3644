"""`config.json` of a model directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json

CONFIG_FILE = "config.json"
_FAST_TWINS = ("dim", "n_head", "n_local_heads", "head_dim", "intermediate_size")


@dataclass
class ModelConfig:
    """Sizes of a DualAR transformer; the defaults are those of the published 1.5.

    `n_local_heads` is the number of key/value heads. Every `fast_*` field defaults to its slow
    twin. `extra` keeps the keys of the file that the model does not use, so that saving loses none.
    """

    vocab_size: int = 102048
    dim: int = 1024
    n_layer: int = 24
    n_head: int = 16
    n_local_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 4096
    rope_base: float = 1_000_000.0
    norm_eps: float = 1e-6
    max_seq_len: int = 8192
    dropout: float = 0.1
    tie_word_embeddings: bool = False
    attention_qkv_bias: bool = False
    codebook_size: int = 1024
    num_codebooks: int = 8
    n_fast_layer: int = 4
    fast_dim: int | None = None
    fast_n_head: int | None = None
    fast_n_local_heads: int | None = None
    fast_head_dim: int | None = None
    fast_intermediate_size: int | None = None
    fast_attention_qkv_bias: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*_FAST_TWINS, "attention_qkv_bias"):
            if getattr(self, f"fast_{name}") is None:
                setattr(self, f"fast_{name}", getattr(self, name))
        if self.head_dim % 2 or self.fast_head_dim % 2:
            raise ValueError("head_dim and fast_head_dim are turned in pairs, so they must be even")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """Read `config.json`. Raises `FileNotFoundError`, or `ValueError` for another model."""
        file = Path(directory) / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; a model directory needs it")
        values = read_json(file)
        model_type = values.pop("model_type", None) if isinstance(values, dict) else None
        if model_type != "dual_ar":
            raise ValueError(f"{file}: model_type is {model_type!r}, but only 'dual_ar' is known")
        kinds = {f.name: type(f.default) for f in fields(cls) if f.name != "extra"}
        for key, kind in kinds.items():
            value = values.get(key)
            if value is not None and kind in (int, float) and not isinstance(value, int | float):
                raise ValueError(f"{file}: {key} is {value!r}, not a number")
        known = {key: value for key, value in values.items() if key in kinds}
        extra = {key: value for key, value in values.items() if key not in kinds}
        try:
            return cls(**known, extra=extra)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Write `config.json` in the published, flat layout."""
        values = asdict(self)
        values.update(values.pop("extra"))
        write_json(
            Path(directory) / CONFIG_FILE, dict(sorted({"model_type": "dual_ar", **values}.items()))
        )
