"""Merging a checkpoint's adapters into its base: a model directory that stands by itself."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import isnan
from pathlib import Path

import torch
from torch import Tensor

from fish_speech.conversation import build_prompt
from fish_speech.datasets.spans import LEARNED_FILE, SpanSet, learned_by_model
from fish_speech.files import atomic_folder, exclusive, file_digest, write_text
from fish_speech.hub import CODEC_PATTERN, MODEL_FILES
from fish_speech.models.text2semantic import DualARTransformer, load_model, save_model
from fish_speech.models.text2semantic.checkpoint import MODEL_FILE
from fish_speech.models.text2semantic.lora import (
    LoRAConfig,
    adapted_targets,
    add_lora,
    load_lora,
    merge_lora,
)
from fish_speech.models.vqgan.codec import CODEC_CONFIG_FILE, find_codec
from fish_speech.models.weights import check_sums, read_checkpoint
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.resume import check_fits
from fish_speech.training.runs import Checkpoint, recorded_lora

_PROMPT = "The quick brown fox jumps over the lazy dog."
# Rounding the merged weights moves the logits by about this share of their size.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_WRITTEN = (*MODEL_FILES, CODEC_CONFIG_FILE, CODEC_PATTERN, LEARNED_FILE)


@dataclass(frozen=True)
class Merged:
    """`error`: how far the written model's logits are from base + adapters; `change`: how far the
    adapters moved them from the base's. Both are root mean squares over that of the logits."""

    folder: Path
    error: float
    change: float


def merge(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    base_dir: Path | None = None,
    lora: LoRAConfig | None = None,
) -> Merged:
    """Write `folder`: base and adapters merged in fp32, saved in the base's dtype, and verified.

    A checkpoint of ours says what it needs; `base_dir` is only for a base that has moved. One of
    upstream says nothing, so it needs `base_dir`, and `lora` for its rank and scale. Raises
    `ValueError` where the base is another one than the adapters were trained on, the adapters
    change nothing, the written model does not do what base and adapters do, or another merge is
    writing the folder.
    """
    check_sums(checkpoint.path)
    content = checkpoint.read() if checkpoint.has_run_record() else read_checkpoint(checkpoint.path)
    adapters = content.get("state_dict", content)
    record = content.get("run")
    base_dir, lora = _needed(checkpoint, record, base_dir, lora)
    if record is None and (targets := adapted_targets(adapters)):
        lora = replace(lora, targets=targets)  # which a preset need not share
    if folder.resolve() == base_dir.resolve():
        raise ValueError(f"{folder}: is the base of this checkpoint; give it another --project")
    dtype = load_model(base_dir).dtype  # mapped: costs nothing
    model = load_model(base_dir, dtype=torch.float32)
    tokenizer = FishTokenizer.from_pretrained(base_dir)
    prompt = build_prompt(tokenizer, _PROMPT, num_codebooks=model.config.num_codebooks)
    base_logits = _logits(model, prompt)
    add_lora(model, lora)
    load_lora(model, adapters, checkpoint.path)
    adapted_logits = _logits(model, prompt)
    merge_lora(model)
    # Not the base's: a voice trained without names answers to none.
    model.config.extra["speakers"] = (record or {}).get("speakers", [])

    # Beside it, for the folder itself is replaced.
    lock = exclusive(folder.with_name(f".{folder.name}"), f"{folder}, being written,")
    with lock, atomic_folder(folder) as new:
        save_model(model.state_dict(), new, config=model.config, tokenizer=tokenizer, dtype=dtype)
        for file in (find_codec(base_dir), base_dir / CODEC_CONFIG_FILE):
            if file.is_file():
                _link_or_copy(file, new / file.name)
        learned = learned_by_model(base_dir)
        if record and "learned" in record:
            learned |= SpanSet.from_json(record["learned"])
        if learned:
            write_text(new / LEARNED_FILE, learned.to_json())
        _keep_others(folder, new)
        del model
        if _same_weights(new, base_dir):
            raise ValueError(
                f"{checkpoint.path}: its adapters change nothing, the merged model would be the "
                "base; train for more steps or at a higher --learning-rate"
            )
        written_logits = _logits(load_model(new, dtype=torch.float32), prompt)
        error = _distance(written_logits, adapted_logits)
        if not error <= _ROUNDING.get(dtype, 1e-4):  # nor where it is no number
            raise ValueError(
                f"{folder}: the merged model differs from base + adapters by {error:.2%} "
                "of its logits, more than rounding explains"
                + ("; the adapters are damaged, or their training diverged" if isnan(error) else "")
                + "; nothing was written"
            )
    return Merged(folder, error, _distance(adapted_logits, base_logits))


def _needed(
    checkpoint: Checkpoint, record: dict | None, base_dir: Path | None, lora: LoRAConfig | None
) -> tuple[Path, LoRAConfig]:
    """The base and the LoRA config of a checkpoint: its own record, or what the caller knows."""
    if record is None:
        if base_dir is None or lora is None:
            raise ValueError(
                f"{checkpoint.path}: does not say what it was trained on; name it with "
                "--checkpoint-path, and its base and LoRA config with --pretrained-ckpt-path or "
                "--model-version and --lora-config"
            )
        return base_dir, lora
    base_dir = Path(base_dir or record["base"])
    if not (base_dir / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"{base_dir}: the base model of {checkpoint.path} is not there any more; "
            "give its place with --pretrained-ckpt-path"
        )
    recorded = recorded_lora(record)
    check_fits(checkpoint, lora or recorded, file_digest(base_dir / MODEL_FILE), base_dir)
    return base_dir, recorded


@torch.inference_mode()
def _logits(model: DualARTransformer, prompt: Tensor) -> Tensor:
    output = model(prompt[None])
    x = model.hidden_states(prompt[None])[:, -1]
    codes = torch.zeros(1, model.config.num_codebooks, dtype=torch.long)
    return torch.cat([output.token_logits.flatten(), model.codebook_logits(x, codes).flatten()])


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def _same_weights(one: Path, other: Path) -> bool:
    a, b = (load_model(folder).state_dict() for folder in (one, other))
    return all(torch.equal(a[key], b[key]) for key in a)


def _keep_others(folder: Path, new: Path) -> None:
    """What somebody put beside a voice stays there when it is merged again."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if any(fnmatch(entry.name, pattern) for pattern in _WRITTEN):
            continue
        if entry.is_symlink():
            (new / entry.name).symlink_to(os.readlink(entry))
        elif entry.is_dir():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link where the file system allows it: the codec is large and never written to."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
