"""`config.json` of a model directory."""

from __future__ import annotations

import math
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json

CONFIG_FILE = "config.json"
_MOST, _MOST_LAYERS = 1 << 24, 1000  # more is a damaged file
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
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "extra" and (what := _wrong(f, value)):
                raise ValueError(f"{f.name} is {value!r}, {what}")
        speakers = self.extra.get("speakers", [])
        if not (isinstance(speakers, list) and all(isinstance(name, str) for name in speakers)):
            raise ValueError(f"speakers is {speakers!r}, not a list of names")
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
        names = {f.name for f in fields(cls) if f.name != "extra"}
        known = {key: value for key, value in values.items() if key in names}
        extra = {key: value for key, value in values.items() if key not in names}
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


def _wrong(f: Field, value: Any) -> str | None:
    """What is wrong with the value of a field; None where nothing is."""
    if "bool" in f.type:
        return None if isinstance(value, bool) else "not true or false"
    if "int" in f.type:
        most = _MOST_LAYERS if f.name.endswith("_layer") else _MOST
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and 1 <= value <= most else f"not a whole number from 1 to {most}"
    fits = isinstance(value, int | float) and 0 <= value < math.inf
    return None if fits else "not a number that makes sense"
