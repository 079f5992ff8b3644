"""One column through a transformer, or two, on a CUDA card: kernels in Triton.

A column is products of matrices with one vector, each no longer than reading its weights. So a
kernel asks for its weights before it waits for the one before it (programmatic dependent launch,
where the card has that): the memory is never idle while vectors of a few kilobytes go round.
Weights stay where the model has them, in its number format; columns are fp32.

Shapes: C columns, D `dim`, H heads and h key/value heads of d, T columns of the cache, F
`intermediate_size`, S parts of the columns that are attended to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fish_speech.models.text2semantic.llama import KeyValueCache, RMSNorm

PARTS = 8  # of the columns that a long speech attends to, each a program by itself
PLACES, ATTEND_WARPS = 64, 8  # columns attended to at once
# Bytes of weights that a program asks for at once (of the first of two), and its warps.
TILES = {
    "_heads": (8 << 10, 4),
    "_project": (8 << 10, 8),
    "_gate": (8 << 10, 2),
    "_down": (32 << 10, 4),
    "_head": (8 << 10, 4),
}


@triton.jit
def begin(PDL: tl.constexpr):
    """The next kernel may be launched, to ask for its weights already."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that earlier kernels wrote is there. Before it, only what no kernel of the frame
    writes may be read, and nothing written."""
    if PDL:
        gdc_wait()


@triton.jit
def _rows(weight, rows, N, K: tl.constexpr, BLOCK: tl.constexpr):
    """Those rows of weights [N, K]."""
    k = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + rows[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _vector(x, K: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _times(weights, x):
    return tl.sum(weights.to(tl.float32) * x[None, :], 1)


@triton.jit
def _scale(x, eps, D: tl.constexpr):
    """What an RMS norm multiplies x [D] by. It is applied to a product's results: the sums for both
    are taken side by side."""
    return tl.rsqrt(tl.sum(x * x, 0) / D + eps)


@triton.jit(do_not_specialize=["layer"])
def _heads(
    x, norm, weight, bias, rotary, queries, place, layer, eps, TURNS, D: tl.constexpr,
    HEADS: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr,
    CACHE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Norm, queries [C, H, d], and keys and values into the cache, turned by `rotary` [2, T, d]."""
    begin(PDL)
    N: tl.constexpr = (HEADS + 2 * LOCAL) * WIDTH
    row = tl.program_id(0) * ROWS + 2 * tl.arange(0, ROWS // 2)
    even, odd = _rows(weight, row, N, D, BLOCK), _rows(weight, row + 1, N, D, BLOCK)
    gain = _vector(norm, D, BLOCK)
    head, index = row // WIDTH, row % WIDTH
    turned = head < HEADS + LOCAL
    asks, key, value = head < HEADS, turned & (head >= HEADS), ~turned & (row < N)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, position = tl.load(place + 2), tl.load(place + 3)
    turn = rotary + position * WIDTH + index
    local = (layer * LOCAL + (head - HEADS) % LOCAL) * size + position
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        vector = _vector(x + column * D, D, BLOCK)
        scale = _scale(vector, eps, D)
        cos = tl.load(turn + column * WIDTH, mask=turned, other=1.0)
        sin = tl.load(turn + (TURNS + column) * WIDTH + 1, mask=turned, other=0.0)
        first, second = _times(even, vector * gain) * scale, _times(odd, vector * gain) * scale
        if BIASED:
            first += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
            second += tl.load(bias + row + 1, mask=row < N, other=0.0).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
        query = queries + column * HEADS * WIDTH + row
        tl.store(query, first, mask=asks)
        tl.store(query + 1, second, mask=asks)
        to = (local + column) * WIDTH + index
        tl.store(keys + to, first.to(CACHE), mask=key)
        tl.store(keys + to + 1, second.to(CACHE), mask=key)
        tl.store(values + to, first.to(CACHE), mask=value)
        tl.store(values + to + 1, second.to(CACHE), mask=value)


@triton.jit
def _part(length, PARTS: tl.constexpr, PLACES: tl.constexpr):
    """Columns in each part of so many."""
    return tl.cdiv(tl.cdiv(length, PARTS), PLACES) * PLACES


@triton.jit(do_not_specialize=["layer"])
def _attend(
    queries, place, sums, sizes, layer, scale, HEADS: tl.constexpr, LOCAL: tl.constexpr,
    WIDTH: tl.constexpr, CACHE: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head's attention to a part of the columns: `sums` [S, H, d] of values, which `sizes`
    [S, 2, H] says the scale of, and the sum of the weights."""
    begin(PDL)
    head, part = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, length = tl.load(place + 2), tl.load(place + 3) + 1
    span = _part(length, PARTS, PLACES)
    low, high = part * span, tl.minimum((part + 1) * span, length)
    start = (layer * LOCAL + head // (HEADS // LOCAL)) * size
    largest, total = -float("inf"), 0.0
    out = tl.zeros([BLOCK], tl.float32)
    wait(PDL)
    query = tl.load(queries + head * WIDTH + i, mask=i < WIDTH, other=0.0) * scale
    for first in range(low, high, PLACES):
        at = first + tl.arange(0, PLACES)
        where = (start + at)[:, None] * WIDTH + i[None, :]
        inside = (at < high)[:, None] & (i < WIDTH)[None, :]
        key = tl.load(keys + where, mask=inside, other=0.0)
        value = tl.load(values + where, mask=inside, other=0.0)
        score = tl.sum(key.to(tl.float32) * query[None, :], 1)
        score = tl.where(at < high, score, -float("inf"))
        most = tl.maximum(largest, tl.max(score, 0))
        weight, shrink = tl.exp(score - most), tl.exp(largest - most)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(weight[:, None] * value.to(tl.float32), 0)
        largest = most
    if low < high:
        tl.store(sums + (part * HEADS + head) * WIDTH + i, out, mask=i < WIDTH)
        tl.store(sizes + 2 * part * HEADS + head, largest)
        tl.store(sizes + (2 * part + 1) * HEADS + head, total)


@triton.jit
def _joined(
    sums, sizes, length, HEADS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PLACES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the parts of `_attend` are together: [H, d]."""
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    real, where = head < HEADS, head[:, None] * WIDTH + i[None, :]
    within = real[:, None] & (i < WIDTH)[None, :]
    # The first is there always; one after the other, so that nothing is asked of other threads.
    out = tl.load(sums + where, mask=within, other=0.0)
    largest = tl.load(sizes + head, mask=real, other=0.0)
    total = tl.load(sizes + HEADS + head, mask=real, other=1.0)
    count = tl.cdiv(length, _part(length, PARTS, PLACES))
    for part in tl.static_range(1, PARTS):
        there, at = real & (part < count), sizes + 2 * part * HEADS + head
        size = tl.load(at, mask=there, other=-float("inf"))
        more = tl.load(at + HEADS, mask=there, other=0.0)
        inside = within & (part < count)
        value = tl.load(sums + part * HEADS * WIDTH + where, mask=inside, other=0.0)
        most = tl.maximum(largest, size)
        shrink, weight = tl.exp(largest - most), tl.exp(size - most)
        total = total * shrink + more * weight
        out = out * shrink[:, None] + value * weight[:, None]
        largest = most
    return out / total[:, None]


@triton.jit
def _attended(
    queries, keys, values, layer, size, length, scale, HEADS: tl.constexpr, LOCAL: tl.constexpr,
    WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads' attention to a few columns: [H, d]."""
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    real = (head < HEADS)[:, None] & (i < WIDTH)[None, :]
    query = tl.load(queries + head[:, None] * WIDTH + i[None, :], mask=real, other=0.0) * scale
    start = (layer * LOCAL + head // (HEADS // LOCAL)) * size
    where = start[:, None] * WIDTH + i[None, :]
    key = tl.load(keys + where, mask=real, other=0.0).to(tl.float32)
    out = tl.load(values + where, mask=real, other=0.0).to(tl.float32)
    largest = tl.sum(key * query, 1)
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    for place in tl.static_range(1, PLACES):
        there = real & (place < length)
        key = tl.load(keys + where + place * WIDTH, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + where + place * WIDTH, mask=there, other=0.0).to(tl.float32)
        score = tl.where(place < length, tl.sum(key * query, 1), -float("inf"))
        most = tl.maximum(largest, score)
        shrink, weight = tl.exp(largest - most), tl.exp(score - most)
        total = total * shrink + weight
        out = out * shrink[:, None] + value * weight[:, None]
        largest = most
    return out / total[:, None]


@triton.jit(do_not_specialize=["layer"])
def _project(
    x, weight, queries, place, sums, sizes, layer, scale, D: tl.constexpr,
    HEADS: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr, CACHE: tl.constexpr,
    COLUMNS: tl.constexpr, FEW: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What was attended to, times weights [D, H * d], added to x [C, D]. Of `FEW` columns each
    program attends itself, else it joins the parts of `_attend`."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)
    within = (head < HEADS)[:, None] & (i < WIDTH)[None, :]
    where = row[:, None, None] * (HEADS * WIDTH) + (head[:, None] * WIDTH + i[None, :])[None, :, :]
    inside = (row < D)[:, None, None] & within[None, :, :]
    weights = tl.load(weight + where, mask=inside, other=0.0)
    keys = tl.load(place).to(tl.pointer_type(CACHE))
    values = tl.load(place + 1).to(tl.pointer_type(CACHE))
    size, length = tl.load(place + 2), tl.load(place + 3) + 1
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        to = x + column * D + row
        before = tl.load(to, mask=row < D, other=0.0)
        if FEW:
            heads = _attended(
                queries + column * HEADS * WIDTH, keys, values, layer, size, length + column,
                scale, HEADS, LOCAL, WIDTH, PLACES, BLOCK_H, BLOCK,
            )  # fmt: skip
        else:
            heads = _joined(sums, sizes, length, HEADS, WIDTH, PARTS, PLACES, BLOCK_H, BLOCK)
        heads = tl.where(within, heads, 0.0)
        more = tl.sum(tl.sum(weights.to(tl.float32) * heads[None, :, :], 2), 1)
        tl.store(to, before + more, mask=row < D)


@triton.jit
def _gate(
    x, norm, weight1, weight3, hidden, eps, D: tl.constexpr, F: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and the first half of SwiGLU: hidden [C, F]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gates, ups = _rows(weight1, row, F, D, BLOCK), _rows(weight3, row, F, D, BLOCK)
    gain = _vector(norm, D, BLOCK)
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        vector = _vector(x + column * D, D, BLOCK)
        scale = _scale(vector, eps, D)
        gate = _times(gates, vector * gain) * scale
        up = _times(ups, vector * gain) * scale
        tl.store(hidden + column * F + row, gate * tl.sigmoid(gate) * up, mask=row < F)


@triton.jit
def _down(
    x, weight, hidden, D: tl.constexpr, F: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The second half, added to x [C, D]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weights = _rows(weight, row, D, F, BLOCK)
    wait(PDL)
    for column in tl.static_range(COLUMNS):
        to = x + column * D + row
        before = tl.load(to, mask=row < D, other=0.0)
        more = _times(weights, _vector(hidden + column * F, F, BLOCK))
        tl.store(to, before + more, mask=row < D)


@triton.jit
def _head(
    x, norm, weight, logits, eps, N, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The last norm and an output layer: x [D] -> logits [N]."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weights = _rows(weight, row, N, D, BLOCK)
    gain = _vector(norm, D, BLOCK)
    wait(PDL)
    vector = _vector(x, D, BLOCK)
    scale = _scale(vector, eps, D)
    tl.store(logits + row, _times(weights, vector * gain) * scale, mask=row < N)


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
        self._parts = (
            torch.empty(PARTS, heads, width, device=device),
            torch.empty(PARTS, 2, heads, device=device),
        )
        kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        local, cached = attention.n_local_heads, kinds[weight.dtype]
        self._heads = {"HEADS": heads, "LOCAL": local, "WIDTH": width, "CACHE": cached}

    def launch(self, x: Tensor, place: Tensor, few: int | None = None) -> None:
        """x [C, D] (fp32) through all blocks, in place, to `place` (see `place_of`). `few` are the
        columns that are attended to then, where they are a handful."""
        assert few or len(x) == 1  # what is attended to in parts is joined for one column
        heads, width = self._heads, self._heads["WIDTH"]
        places = triton.next_power_of_2(few) if few else PLACES
        attends = {**heads, "PARTS": PARTS, "PLACES": places}
        sizes = {"COLUMNS": len(x), "D": x.shape[1]}
        wide = {**sizes, "F": self._hidden.shape[1]}
        for layer, block in enumerate(self._blocks):
            attention, feed_forward, norm = block.attention, block.feed_forward, block.ffn_norm
            wqkv, wo = attention.wqkv, attention.wo.weight
            w1, w2, w3 = (getattr(feed_forward, name).weight for name in ("w1", "w2", "w3"))
            _launch(
                _heads, wqkv.weight, x, block.attention_norm.weight, wqkv.weight, wqkv.bias,
                self._rotary, self._queries, place, layer, block.attention_norm.eps,
                self._rotary.shape[1],
                **sizes, **heads, BIASED=wqkv.bias is not None,
            )  # fmt: skip
            seen = self._queries, place, *self._parts, layer, width**-0.5
            if not few:
                _attend[heads["HEADS"], PARTS](
                    *seen, **attends, BLOCK=triton.next_power_of_2(width),
                    **launch_options(x.device, ATTEND_WARPS),
                )  # fmt: skip
            _launch(_project, wo, x, wo, *seen, **sizes, **attends, FEW=bool(few))
            _launch(_gate, w1, x, norm.weight, w1, w3, self._hidden, norm.eps, **wide)
            _launch(_down, w2, x, w2, self._hidden, **wide)


def launch_head(x: Tensor, norm: RMSNorm, weight: Tensor, logits: Tensor) -> None:
    """x [D] (fp32) -> logits [N], of weights [N, D]."""
    _launch(_head, weight, x, norm.weight, weight, logits, norm.eps, len(weight), D=weight.shape[1])


def _launch(kernel: Any, weight: Tensor, *args: Any, **sizes: Any) -> None:
    """Launch a kernel whose programs share the rows of a weight [N, K]."""
    count, width = weight.shape
    tile, warps = TILES[kernel.__name__]
    if kernel is _project:
        heads, size = (triton.next_power_of_2(sizes[name]) for name in ("HEADS", "WIDTH"))
        block, sizes = heads * size, {**sizes, "BLOCK_H": heads, "BLOCK": size}
    else:
        block = sizes["BLOCK"] = triton.next_power_of_2(width)
    rows = max(1 + (kernel is _heads), tile // (block * weight.element_size()))  # it takes pairs
    sizes["ROWS"] = 1 << (rows.bit_length() - 1)
    grid = (triton.cdiv(count, sizes["ROWS"]),)
    kernel[grid](*args, **sizes, **launch_options(weight.device, warps))
