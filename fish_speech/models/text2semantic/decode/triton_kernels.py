"""A decoding step of one position, or two, on a CUDA card: Triton kernels.

A step is matrix-vector products, each as long as reading its weights. So a kernel loads its weights
before it waits for the kernel before it (programmatic dependent launch, where the card has that):
the memory is never idle while vectors of a few kilobytes go round. Weights stay where the model has
them, in its dtype; activations are fp32.

Shapes: C columns (positions), D `dim`, H heads and h key/value heads of d, T positions of the
cache, F `intermediate_size`, S splits of the keys (as in flash decoding).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fish_speech.models.text2semantic.layers import KeyValueCache, RMSNorm

SPLITS = 8  # of the keys, each a program by itself
KV_BLOCK, ATTEND_WARPS = 64, 8  # keys at once
# Bytes of weights that a program loads at once (of the first of two), and its warps.
TILES = {
    "_qkv": (8 << 10, 4),
    "_out_proj": (8 << 10, 8),
    "_gate_up": (8 << 10, 2),
    "_down_proj": (32 << 10, 4),
    "_head": (8 << 10, 4),
}


@triton.jit
def begin(PDL: tl.constexpr):
    """The next kernel may be launched, to load its weights already."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that earlier kernels wrote is there. Before it, only what no kernel of the frame
    writes may be read, and nothing written."""
    if PDL:
        gdc_wait()


@triton.jit
def _load_rows(weight, rows, N, K: tl.constexpr, BLOCK: tl.constexpr):
    """Those rows of weights [N, K]."""
    k = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + rows[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _load_vector(x, K: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _matvec(weights, x):
    return tl.sum(weights.to(tl.float32) * x[None, :], 1)


@triton.jit
def _rms_scale(x, eps, D: tl.constexpr):
    """What an RMS norm multiplies x [D] by. It is applied to a product's results, so that both sums
    are computed side by side."""
    return tl.rsqrt(tl.sum(x * x, 0) / D + eps)


@triton.jit(do_not_specialize=["layer"])
def _qkv(
    x, norm, weight, bias, rotary, queries, place, layer, eps, SINES, D: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BIASED: tl.constexpr,
    CACHE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Norm, queries [C, H, d], and keys and values into the cache, rotated by `rotary`
    [2, T, d]."""
    begin(PDL)
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    row = tl.program_id(0) * ROWS + 2 * tl.arange(0, ROWS // 2)
    even, odd = _load_rows(weight, row, N, D, BLOCK), _load_rows(weight, row + 1, N, D, BLOCK)
    gain = _load_vector(norm, D, BLOCK)
    head, index = row // HEAD_DIM, row % HEAD_DIM
    rotates = head < HEADS + KV_HEADS
    is_query, key, value = head < HEADS, rotates & (head >= HEADS), ~rotates & (row < N)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, position = tl.load(place + 2), tl.load(place + 3)
    angle = rotary + position * HEAD_DIM + index
    local = (layer * KV_HEADS + (head - HEADS) % KV_HEADS) * size + position
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        vector = _load_vector(x + column * D, D, BLOCK)
        scale = _rms_scale(vector, eps, D)
        cos = tl.load(angle + column * HEAD_DIM, mask=rotates, other=1.0)
        sin = tl.load(angle + (SINES + column) * HEAD_DIM + 1, mask=rotates, other=0.0)
        first, second = _matvec(even, vector * gain) * scale, _matvec(odd, vector * gain) * scale
        if BIASED:
            first += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
            second += tl.load(bias + row + 1, mask=row < N, other=0.0).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
        query = queries + column * HEADS * HEAD_DIM + row
        tl.store(query, first, mask=is_query)
        tl.store(query + 1, second, mask=is_query)
        to = (local + column) * HEAD_DIM + index
        tl.store(keys + to, first.to(CACHE), mask=key)
        tl.store(keys + to + 1, second.to(CACHE), mask=key)
        tl.store(values + to, first.to(CACHE), mask=value)
        tl.store(values + to + 1, second.to(CACHE), mask=value)


@triton.jit
def _split_size(length, SPLITS: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Keys in each split of so many."""
    return tl.cdiv(tl.cdiv(length, SPLITS), KV_BLOCK) * KV_BLOCK


@triton.jit(do_not_specialize=["layer"])
def _split_attention(
    queries, place, split_out, split_stats, layer, scale, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CACHE: tl.constexpr, SPLITS: tl.constexpr,
    KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head's attention to one split of the keys: weighted sums of values into `split_out`
    [S, H, d], the largest score and the sum of the weights into `split_stats` [S, 2, H]."""
    begin(PDL)
    head, split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, length = tl.load(place + 2), tl.load(place + 3) + 1
    span = _split_size(length, SPLITS, KV_BLOCK)
    low, high = split * span, tl.minimum((split + 1) * span, length)
    start = (layer * KV_HEADS + head // (HEADS // KV_HEADS)) * size
    running_max, total = -float("inf"), 0.0
    out = tl.zeros([BLOCK], tl.float32)
    wait(PDL)
    query = tl.load(queries + head * HEAD_DIM + i, mask=i < HEAD_DIM, other=0.0) * scale
    for first in range(low, high, KV_BLOCK):
        at = first + tl.arange(0, KV_BLOCK)
        where = (start + at)[:, None] * HEAD_DIM + i[None, :]
        inside = (at < high)[:, None] & (i < HEAD_DIM)[None, :]
        key = tl.load(keys + where, mask=inside, other=0.0)
        value = tl.load(values + where, mask=inside, other=0.0)
        score = tl.sum(key.to(tl.float32) * query[None, :], 1)
        score = tl.where(at < high, score, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(score, 0))
        weight, rescale = tl.exp(score - new_max), tl.exp(running_max - new_max)
        total = total * rescale + tl.sum(weight, 0)
        out = out * rescale + tl.sum(weight[:, None] * value.to(tl.float32), 0)
        running_max = new_max
    if low < high:
        tl.store(split_out + (split * HEADS + head) * HEAD_DIM + i, out, mask=i < HEAD_DIM)
        tl.store(split_stats + 2 * split * HEADS + head, running_max)
        tl.store(split_stats + (2 * split + 1) * HEADS + head, total)


@triton.jit
def _combine_splits(
    split_out, split_stats, length, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine the splits of `_split_attention`: [H, d]."""
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    real, where = head < HEADS, head[:, None] * HEAD_DIM + i[None, :]
    within = real[:, None] & (i < HEAD_DIM)[None, :]
    # The first is always there; one after the other, so that no thread waits for others.
    out = tl.load(split_out + where, mask=within, other=0.0)
    running_max = tl.load(split_stats + head, mask=real, other=0.0)
    total = tl.load(split_stats + HEADS + head, mask=real, other=1.0)
    count = tl.cdiv(length, _split_size(length, SPLITS, KV_BLOCK))
    for split in tl.static_range(1, SPLITS):
        there, at = real & (split < count), split_stats + 2 * split * HEADS + head
        size = tl.load(at, mask=there, other=-float("inf"))
        more = tl.load(at + HEADS, mask=there, other=0.0)
        inside = within & (split < count)
        value = tl.load(split_out + split * HEADS * HEAD_DIM + where, mask=inside, other=0.0)
        new_max = tl.maximum(running_max, size)
        rescale, weight = tl.exp(running_max - new_max), tl.exp(size - new_max)
        total = total * rescale + more * weight
        out = out * rescale[:, None] + value * weight[:, None]
        running_max = new_max
    return out / total[:, None]


@triton.jit
def _short_attention(
    queries, keys, values, layer, size, length, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads' attention to a few keys: [H, d]."""
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    real = (head < HEADS)[:, None] & (i < HEAD_DIM)[None, :]
    query = tl.load(queries + head[:, None] * HEAD_DIM + i[None, :], mask=real, other=0.0) * scale
    start = (layer * KV_HEADS + head // (HEADS // KV_HEADS)) * size
    where = start[:, None] * HEAD_DIM + i[None, :]
    key = tl.load(keys + where, mask=real, other=0.0).to(tl.float32)
    out = tl.load(values + where, mask=real, other=0.0).to(tl.float32)
    running_max = tl.sum(key * query, 1)
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    for place in tl.static_range(1, KV_BLOCK):
        there = real & (place < length)
        key = tl.load(keys + where + place * HEAD_DIM, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + where + place * HEAD_DIM, mask=there, other=0.0).to(tl.float32)
        score = tl.where(place < length, tl.sum(key * query, 1), -float("inf"))
        new_max = tl.maximum(running_max, score)
        rescale, weight = tl.exp(running_max - new_max), tl.exp(score - new_max)
        total = total * rescale + weight
        out = out * rescale[:, None] + value * weight[:, None]
        running_max = new_max
    return out / total[:, None]


@triton.jit(do_not_specialize=["layer"])
def _out_proj(
    x, weight, queries, place, split_out, split_stats, layer, scale, D: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CACHE: tl.constexpr,
    COLUMNS: tl.constexpr, INLINE: tl.constexpr, SPLITS: tl.constexpr, KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention's output times weights [D, H * d], added to x [C, D]. With `INLINE` each program
    computes the attention itself, else it combines the splits of `_split_attention`."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    within = (head < HEADS)[:, None] & (i < HEAD_DIM)[None, :]
    where = (
        row[:, None, None] * (HEADS * HEAD_DIM)
        + (head[:, None] * HEAD_DIM + i[None, :])[None, :, :]
    )
    inside = (row < D)[:, None, None] & within[None, :, :]
    weights = tl.load(weight + where, mask=inside, other=0.0)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, length = tl.load(place + 2), tl.load(place + 3) + 1
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        to = x + column * D + row
        before = tl.load(to, mask=row < D, other=0.0)
        if INLINE:
            heads = _short_attention(
                queries + column * HEADS * HEAD_DIM, keys, values, layer, size, length + column,
                scale, HEADS, KV_HEADS, HEAD_DIM, KV_BLOCK, BLOCK_H, BLOCK,
            )  # fmt: skip
        else:
            heads = _combine_splits(
                split_out, split_stats, length, HEADS, HEAD_DIM, SPLITS, KV_BLOCK, BLOCK_H, BLOCK
            )
        heads = tl.where(within, heads, 0.0)
        more = tl.sum(tl.sum(weights.to(tl.float32) * heads[None, :, :], 2), 1)
        tl.store(to, before + more, mask=row < D)


@triton.jit
def _gate_up(
    x, norm, weight1, weight3, hidden, eps, D: tl.constexpr, F: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and the first half of SwiGLU: hidden [C, F]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gates, ups = _load_rows(weight1, row, F, D, BLOCK), _load_rows(weight3, row, F, D, BLOCK)
    gain = _load_vector(norm, D, BLOCK)
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        vector = _load_vector(x + column * D, D, BLOCK)
        scale = _rms_scale(vector, eps, D)
        gate = _matvec(gates, vector * gain) * scale
        up = _matvec(ups, vector * gain) * scale
        tl.store(hidden + column * F + row, gate * tl.sigmoid(gate) * up, mask=row < F)


@triton.jit
def _down_proj(
    x, weight, hidden, D: tl.constexpr, F: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The second half, added to x [C, D]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weights = _load_rows(weight, row, D, F, BLOCK)
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        to = x + column * D + row
        before = tl.load(to, mask=row < D, other=0.0)
        more = _matvec(weights, _load_vector(hidden + column * F, F, BLOCK))
        tl.store(to, before + more, mask=row < D)


@triton.jit
def _head(
    x, norm, weight, logits, eps, N, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The last norm and an output layer: x [D] -> logits [N]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weights = _load_rows(weight, row, N, D, BLOCK)
    gain = _load_vector(norm, D, BLOCK)
    wait(PDL)
    vector = _load_vector(x, D, BLOCK)
    scale = _rms_scale(vector, eps, D)
    tl.store(logits + row, _matvec(weights, vector * gain) * scale, mask=row < N)


def overlaps(device: torch.device) -> bool:
    """Whether the card launches a kernel while the one before it still runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device, warps: int) -> dict[str, Any]:
    """How every kernel of a column is launched."""
    early = overlaps(device)
    return {"PDL": early, "num_warps": warps, **({"launch_pdl": True} if early else {})}


def place_of(cache: KeyValueCache, position: int) -> Tensor:
    """Where a column's keys and values are: addresses, size and position [4] (int64)."""
    first = cache.keys.data_ptr(), cache.values.data_ptr()
    return torch.tensor([*first, cache.size, position])


class Stack:
    """All blocks of a transformer, for up to `columns` at a time; `rotary` is [2, T, d] in fp32."""

    def __init__(self, blocks: nn.ModuleList, rotary: Tensor, columns: int) -> None:
        attention, weight = blocks[0].attention, blocks[0].feed_forward.w2.weight  # [D, F]
        self._blocks, self._rotary, device = blocks, rotary.contiguous(), weight.device
        heads, width = attention.n_head, attention.head_dim
        self._queries = torch.empty(columns, heads, width, device=device)
        self._hidden = torch.empty(columns, weight.shape[1], device=device)
        self._splits = (
            torch.empty(SPLITS, heads, width, device=device),
            torch.empty(SPLITS, 2, heads, device=device),
        )
        kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        local, cached = attention.n_local_heads, kinds[weight.dtype]
        self._heads = {"HEADS": heads, "KV_HEADS": local, "HEAD_DIM": width, "CACHE": cached}

    def launch(self, x: Tensor, place: Tensor, few: int | None = None) -> None:
        """x [C, D] (fp32) through all blocks, in place, to `place` (see `place_of`). `few` are the
        columns that are attended to then, where they are a handful."""
        assert few or len(x) == 1  # splits are combined for one position only
        heads, width = self._heads, self._heads["HEAD_DIM"]
        places = triton.next_power_of_2(few) if few else KV_BLOCK
        attends = {**heads, "SPLITS": SPLITS, "KV_BLOCK": places}
        sizes = {"COLUMNS": len(x), "D": x.shape[1]}
        wide = {**sizes, "F": self._hidden.shape[1]}
        for layer, block in enumerate(self._blocks):
            attention, feed_forward, norm = block.attention, block.feed_forward, block.ffn_norm
            wqkv, wo = attention.wqkv, attention.wo.weight
            w1, w2, w3 = (getattr(feed_forward, name).weight for name in ("w1", "w2", "w3"))
            _launch(
                _qkv, wqkv.weight, x, block.attention_norm.weight, wqkv.weight, wqkv.bias,
                self._rotary, self._queries, place, layer, block.attention_norm.eps,
                self._rotary.shape[1],
                **sizes, **heads, BIASED=wqkv.bias is not None,
            )  # fmt: skip
            seen = self._queries, place, *self._splits, layer, width**-0.5
            if not few:
                _split_attention[heads["HEADS"], SPLITS](
                    *seen, **attends, BLOCK=triton.next_power_of_2(width),
                    **launch_options(x.device, ATTEND_WARPS),
                )  # fmt: skip
            _launch(_out_proj, wo, x, wo, *seen, **sizes, **attends, INLINE=bool(few))
            _launch(_gate_up, w1, x, norm.weight, w1, w3, self._hidden, norm.eps, **wide)
            _launch(_down_proj, w2, x, w2, self._hidden, **wide)


def launch_head(x: Tensor, norm: RMSNorm, weight: Tensor, logits: Tensor) -> None:
    """x [D] (fp32) -> logits [N], of weights [N, D]."""
    _launch(_head, weight, x, norm.weight, weight, logits, norm.eps, len(weight), D=weight.shape[1])


def _launch(kernel: Any, weight: Tensor, *args: Any, **sizes: Any) -> None:
    """Launch a kernel whose programs share the rows of a weight [N, K]."""
    count, width = weight.shape
    tile, warps = TILES[kernel.__name__]
    if kernel is _out_proj:
        heads, size = (triton.next_power_of_2(sizes[name]) for name in ("HEADS", "HEAD_DIM"))
        block, sizes = heads * size, {**sizes, "BLOCK_H": heads, "BLOCK": size}
    else:
        block = sizes["BLOCK"] = triton.next_power_of_2(width)
    rows = max(1 + (kernel is _qkv), tile // (block * weight.element_size()))  # it takes pairs
    sizes["ROWS"] = 1 << (rows.bit_length() - 1)
    grid = (triton.cdiv(count, sizes["ROWS"]),)
    kernel[grid](*args, **sizes, **launch_options(weight.device, warps))
