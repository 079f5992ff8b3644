"""The useful work of a training step, a frame and a stretch of audio, in FLOP.

Counted from sizes, never from what the package happens to run: recomputation and padding do not
make a figure better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from benchmarks.limits import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fish_speech.models.text2semantic import ModelConfig


def training_shapes(config: ModelConfig, tokens: int, frames: int) -> list[Shape]:
    """The matrix products of the forward over one item: `frames` of its `tokens` have labels.

    Row 0 is learned at the frames and the two control tokens around them.
    """
    c = config
    slow = _block_shapes(c.dim, c.n_head, c.n_local_heads, c.head_dim, c.intermediate_size)
    fast = _block_shapes(
        c.fast_dim, c.fast_n_head, c.fast_n_local_heads, c.fast_head_dim, c.fast_intermediate_size
    )
    codes = frames * config.num_codebooks
    return [
        *[(tokens, *sizes) for sizes in slow * config.n_layer],
        (frames + 2, config.dim, config.vocab_size),
        *[(codes, *sizes) for sizes in fast * config.n_fast_layer],
        (codes, config.fast_dim, config.codebook_size),
    ]


def training_flops(config: ModelConfig, tokens: int, frames: int, rank: int) -> int:
    """Forward, gradients of the activations through the frozen base, and those of the adapters.

    Norms, lookups and the optimizer count as nothing.
    """
    flops = 0
    for rows, width, out in training_shapes(config, tokens, frames):
        flops += 2 * (2 * rows * width * out)  # there is no gradient of a frozen weight
        flops += 3 * (2 * rows * rank * (width + out))
    slow = config.n_layer * config.n_head * config.head_dim * _pairs(tokens)
    fast = config.n_fast_layer * config.fast_n_head * config.fast_head_dim
    fast *= frames * _pairs(config.num_codebooks)
    return flops + 3 * (2 * 2 * (slow + fast))  # scores, and sums of values


def frame_weights(config: ModelConfig) -> int:
    """Weights that a generated frame has to read.

    The slow layers, the rows of row 0 that may be sampled, and the fast layers for every code but
    the first, which follows from row 0.
    """
    shapes = training_shapes(config, 1, 1)
    blocks = [width * out for _, width, out in shapes]
    vocabulary = 5 * config.n_layer
    slow, fast = sum(blocks[:vocabulary]), sum(blocks[vocabulary + 1 :])
    sampled = (config.codebook_size + 1) * config.dim
    return slow + sampled + (config.num_codebooks - 1) * fast


def module_shapes(module: nn.Module, call: Callable[[], object]) -> list[tuple[Shape, int]]:
    """The products that the convolutions and linear layers of a module do in a call.

    Each as (rows, in, out) of one group, with the number of its groups.
    """
    from torch import nn

    from fish_speech.models.vqgan.firefly import CausalConv1d, CausalConvTranspose1d

    found: list[tuple[Shape, int]] = []

    def record(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        layer = getattr(layer, "conv", layer)  # of a causal one
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.ConvTranspose1d):  # every input frame meets the whole kernel
            frames, (width, out, kernel) = inputs[0], layer.weight.shape
            shape = frames.shape[0] * frames.shape[-1], width // groups, out * kernel
        elif isinstance(layer, nn.Conv1d):
            out, width, kernel = layer.weight.shape
            shape = output.shape[0] * output.shape[-1], width * kernel, out // groups
        else:
            shape = output.numel() // output.shape[-1], *reversed(layer.weight.shape)
        found.append((shape, groups))

    layers = (nn.Linear, nn.Conv1d, CausalConv1d, CausalConvTranspose1d)
    handles = [m.register_forward_hook(record) for m in module.modules() if isinstance(m, layers)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def flops_of(shapes: Iterable[tuple[Shape, int]]) -> int:
    """Of a forward only."""
    return sum(2 * groups * rows * width * out for (rows, width, out), groups in shapes)


def _block_shapes(
    dim: int, heads: int, local_heads: int, head_dim: int, hidden: int
) -> list[tuple[int, int]]:
    """(in, out) of the five linear layers of a transformer block."""
    attention = [(dim, (heads + 2 * local_heads) * head_dim), (heads * head_dim, dim)]
    return [*attention, (dim, hidden), (dim, hidden), (hidden, dim)]


def _pairs(length: int) -> int:
    """Pairs of a query and a key in causal attention."""
    return length * (length + 1) // 2
