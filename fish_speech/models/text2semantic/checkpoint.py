"""Model directories of the language model: load and save. Its only reader and writer of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fish_speech.models.text2semantic.config import ModelConfig
from fish_speech.models.text2semantic.llama import DualARTransformer
from fish_speech.models.weights import assign_strictly, empty_modules, read_state_dict, save_tensors
from fish_speech.tokenizer import FishTokenizer

MODEL_FILE = "model.pth"


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> DualARTransformer:
    """Load a model directory strictly, in eval mode.

    The weights are mapped, not read: with `dtype` None (the file's own) no second copy ever exists.
    Raises `FileNotFoundError` or `ValueError` that names file, key and both shapes.
    """
    directory = Path(directory)
    config = ModelConfig.from_pretrained(directory)
    tokenizer = FishTokenizer.from_pretrained(directory)
    if tokenizer.vocab_size != config.vocab_size or tokenizer.codebook_size != config.codebook_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and "
            f"{tokenizer.codebook_size} codes, config.json says {config.vocab_size} and "
            f"{config.codebook_size}; the files belong to different models"
        )
    file = directory / MODEL_FILE
    state = read_state_dict(file, prefixes=("model.",))
    if any(".lora_" in key for key in state):
        raise ValueError(
            f"{file}: holds LoRA adapters that are not merged; "
            "run finetune_tts.py --project NAME --merge-weights"
        )
    _join_qkv(state)
    with empty_modules():
        model = DualARTransformer(config)
    assign_strictly(model, state, file)
    model.semantic_begin_id = tokenizer.semantic_begin_id
    # One dtype throughout: a file of mixed ones would end in dtype errors later.
    return model.to(device=device, dtype=dtype or model.dtype).eval()


def save_model(
    state: dict[str, Tensor],
    directory: str | Path,
    *,
    config: ModelConfig,
    tokenizer: FishTokenizer,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the four files of a model directory in the published layout, weights in `dtype`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory)
    tokenizer.save(directory)
    # `clone` so that a view is not saved with all of its storage.
    state = {key: value.detach().to("cpu", dtype).clone() for key, value in state.items()}
    save_tensors(state, directory / MODEL_FILE)


def _join_qkv(state: dict[str, Tensor]) -> None:
    """Some checkpoints hold `wq wk wv` apart; the model has them as one."""
    for kind in ("weight", "bias"):
        for key in [key for key in state if key.endswith(f".attention.wq.{kind}")]:
            names = [key.replace(".wq.", f".{part}.") for part in ("wq", "wk", "wv")]
            if all(name in state for name in names):
                state[key.replace(".wq.", ".wqkv.")] = torch.cat([state.pop(n) for n in names])
