"""What a training will need, said before it begins, and how it is done with the memory there is."""

from __future__ import annotations

import torch

from fish_speech.console import Say, counted
from fish_speech.datasets.semantic import SemanticDataModule
from fish_speech.devices import triton_unavailable_reason
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.resources import free_memory
from fish_speech.training.config import RunConfig
from fish_speech.training.loss import FRAME_CHUNK, LABEL_CHUNK, chunk_size


def out_of_memory(*, graphs: bool) -> str:
    """What is said of it, `graphs`: where batches became CUDA graphs."""
    return (
        "out of memory; try "
        + ("--override train.cuda_graphs=false (half the memory), " if graphs else "")
        + "--batch-size 1 with --gradient-accumulation-steps, "
        "--override train.gradient_checkpointing=true, --lora-config r_4_alpha_8, "
        "or shorter clips (--override data.max_length=512)"
    )


def preflight(
    config: RunConfig,
    model: DualARTransformer,
    data: SemanticDataModule,
    frame_rate: float,
    device: torch.device,
    say: Say,
) -> bool:
    """Say what will be trained and what it needs; choose gradient checkpointing. Returns whether
    batches become CUDA graphs, which need as much memory again."""
    minutes = sum(map(data.train.num_frames, range(len(data.train)))) / frame_rate / 60
    say(
        f"training on {counted(len(data.train), 'utterance')} ({minutes:.1f} minutes), "
        f"{len(data.validation)} held out, {counted(len(data.train.by_speaker), 'speaker')}; "
        f"batch {data.batch_size} x {data.accumulate}, device {device}, base in {model.dtype}"
    )
    if not len(data.validation):
        say("warning: nothing is held out, so there is no validation loss")
    longest = max(map(data.train.num_positions, range(len(data.train))))
    longest *= 2 if config.data.reference_share else 1
    positions = data.batch_size * min(longest, config.data.max_length)
    needs = {chosen: expected_memory(model, positions, chosen, device) for chosen in (False, True)}
    free = free_memory(device)
    setting = str(config.train.gradient_checkpointing).lower()
    chosen = needs[False] > 0.8 * free if setting == "auto" else setting == "true"
    model.gradient_checkpointing = chosen
    say(
        f"memory: about {needs[chosen] / 1e9:.1f} GB {'with' if chosen else 'without'} gradient "
        f"checkpointing, {free / 1e9:.1f} GB are free"
    )
    if needs[chosen] > free:
        say(f"warning: this may not fit: {out_of_memory(graphs=False)}")
    alone = config.train.devices * config.train.num_nodes == 1
    possible = (
        config.train.cuda_graphs and alone and not chosen and not triton_unavailable_reason(device)
    )
    return possible and 2 * needs[False] < 0.8 * free


def expected_memory(
    model: DualARTransformer, positions: int, checkpointing: bool, device: torch.device
) -> int:
    """About how many bytes training needs for a batch of so many positions, all of them frames."""
    labels, frames = (
        min(positions, chunk_size(most, device)) for most in (LABEL_CHUNK, FRAME_CHUNK)
    )
    c = model.config
    size = model.embeddings.weight.element_size()
    slow_learns = any(
        p.requires_grad for name, p in model.named_parameters() if not name.startswith("fast_")
    )
    n_layer = c.n_layer if slow_learns else 0  # whose activations are kept
    # The factors were measured: what a block keeps for its backward, adapters included.
    slow = positions * size * (8 * c.dim + 2 * c.intermediate_size)
    fast = frames * c.num_codebooks * size * (8 * c.fast_dim + 2 * c.fast_intermediate_size)
    if checkpointing:  # the inputs of all blocks, and one block
        inputs = positions * size * n_layer * c.dim
        inputs += frames * size * c.n_fast_layer * c.num_codebooks * c.fast_dim
        blocks = inputs + max(slow, fast)
    else:
        blocks = n_layer * slow + c.n_fast_layer * fast
    # A card needs a copy in fp32 at most, torch's operations two.
    copies = 4 + size if device.type == "cuda" else 3 * 4
    logits = copies * (labels * c.vocab_size + frames * c.num_codebooks * c.codebook_size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return weights + trained * 12 + blocks + logits  # gradients and two moments in fp32
