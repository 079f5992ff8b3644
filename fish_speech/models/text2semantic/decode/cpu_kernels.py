"""One or a few columns through a stack of transformer blocks on a CPU, compiled by numba.

There a frame costs reading every weight once, and calling an operation takes as long as reading a
quarter of a megabyte. So all blocks are one call, in which the threads of a `Team` share the rows
of every product. Weights are fp32, bf16 as its bits (uint16), or int8 with a scale for each row.

Shapes: C columns, L layers, D `dim`, H heads and h key/value heads of d, T columns of the cache,
F `intermediate_size`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import float32, from_dtype, int8, int16, int64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from fish_speech.models.text2semantic.decode import cpu_dot as dots
from fish_speech.models.text2semantic.decode.cpu_dot import dot

_ONE, _TINY, LEAST = float32(1), float32(1e-12), float32(-3e38)
_LOG2_E, _LARGEST = float32(math.log2(math.e)), float32(126)
_VECTOR, _MATRIX, _CUBE, _CACHE = (
    float32[::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, :, ::1],
)  # fmt: skip
_INLINE = {"inline": "always", "error_model": "numpy"}
_TILE = 16  # rows, which stay in a core's cache while columns pass
# Which loops run as vectors depends on where arrays lie: sums and quotients may not come out in
# another way then, or a seed speaks otherwise from one start to the next.
_ALIKE = {"nnan", "ninf", "nsz", "contract"}


def compiled(*takes, gives=types.void, kind="", fastmath=True):
    """Compiled once, and kept for the next time where that can be written.

    What numba keeps it renews when the function's own file changes. So the name says of what
    content of this file, from which others take functions, and of that of the products it is, and
    for what `kind` of weights.
    """
    content = crc32(Path(dots.__file__).read_bytes(), crc32(Path(__file__).read_bytes()))

    def compile_function(function):
        options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}
        name = function.__qualname__
        for attempt in ("", "_again"):  # the second where what is kept is broken
            try:
                function.__qualname__ = f"{name}_{kind}_{content:08x}{attempt}"
                return njit(gives(*takes), cache=True, **options)(function)
            except Exception:  # that, or no folder to keep it in, or no room there
                continue
            finally:
                function.__qualname__ = name
        return njit(gives(*takes), **options)(function)

    return compile_function


# Places in `sync`, each on a cache line of its own: how many have come, how often all have, and
# whether nobody may wait any longer.
_COME, _ROUND, OVER = 0, 16, 32
SYNC_SIZE = 48
_SPINS = 2000  # looks, some microseconds, before the processor is offered to others

_SYNC = int64[::1]
_yield = types.ExternalFunction(
    "SwitchToThread" if os.name == "nt" else "sched_yield", types.int32()
)


def _atomic(build: Callable) -> Any:
    """An operation on an element of `sync` that all threads see in the same order."""

    @intrinsic
    def operation(context, sync, place, value):
        def codegen(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            pointer = cgutils.gep(builder, array.data, args[1])
            return build(builder, pointer, args[2])

        return int64(sync, int64, int64), codegen

    return operation


_count = _atomic(lambda builder, at, value: builder.atomic_rmw("add", at, value, "seq_cst"))
_exchange = _atomic(lambda builder, at, value: builder.atomic_rmw("xchg", at, value, "seq_cst"))
_load = _atomic(lambda builder, at, _: builder.load_atomic(at, "seq_cst", 8, typ=ir.IntType(64)))


@njit
def meet(sync, size):
    """Wait until all threads are here; what each wrote before, all may read after."""
    if size == 1:
        return
    now = _load(sync, _ROUND, 0)
    if _count(sync, _COME, 1) == size - 1:
        _exchange(sync, _COME, 0)
        _count(sync, _ROUND, 1)
        return
    looks = 0
    while _load(sync, _ROUND, 0) == now and _load(sync, OVER, 0) == 0:
        looks += 1
        if looks > _SPINS:
            _yield()


@njit
def share(count, part):
    """Which of `count` things are a thread's: the first, and the one behind the last. `part` is
    its place, and the number of threads."""
    place, size = part
    return count * place // size, count * (place + 1) // size


def _taken(columns, width, weights):
    """Room for columns [C, width] as what weights of a kind are multiplied with."""


@overload(_taken)
def _typed_room(columns, width, weights):
    kind = np.int16 if weights.dtype == int8 else np.float32
    return lambda columns, width, weights: np.empty((columns, width), kind)


def _take(x, row):
    """x [K] into a row of `_taken`; returns the size of its steps."""


@overload(_take)
def _typed_take(x, row):
    def steps(x, row):
        # As many as fit where each product is added to 32 bits: 12 bits of K = 4096, else more.
        most = float32(min(32767, (2**31 - 1) // (127 * len(x))))
        size = _TINY
        for index in range(len(x)):
            size = max(size, abs(x[index]))
        scale = most / size
        for index in range(len(x)):
            row[index] = int16(np.rint(x[index] * scale))
        return size / most

    def copy(x, row):
        for index in range(len(x)):
            row[index] = x[index]
        return _ONE

    return steps if row.dtype == int16 else copy


@njit
def _product(begin, end, weights, scales, taken, sizes, out):
    """Those rows of weights [N, K] times columns of `_taken` [C, K], into out [C, N]."""
    for low in range(begin, end, _TILE):
        for column in range(len(taken)):
            for number in range(low, min(end, low + _TILE)):
                value = dot(weights, number, taken, column)
                out[column, number] = value * (scales[number] * sizes[column])


@njit(**_INLINE)
def exp(x):
    """e^x as 2^whole * 2^part: the exponent of a float, and a polynomial (Taylor's). Unlike
    `math.exp` it is computed for many at once."""
    power = min(max(x * _LOG2_E, -_LARGEST), _LARGEST)
    whole = np.rint(power)
    part = power - whole
    small = float32(0.00015403530393381609)
    small = small * part + float32(0.0013333558146428443)
    small = small * part + float32(0.009618129107628477)
    small = small * part + float32(0.05550410866482158)
    small = small * part + float32(0.2402265069591007)
    small = small * part + float32(0.6931471805599453)
    small = small * part + _ONE
    exponent = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return exponent.view(np.float32) * small


@njit(**_INLINE)
def silu(x):
    return x / (_ONE + exp(-x))


@njit(fastmath=True)  # always as vectors: nothing is written here
def _product_of(x, y):
    """The sum of x [N] times y [N]."""
    total = float32(0)
    for index in range(len(x)):
        total += x[index] * y[index]
    return total


@njit(fastmath=True)
def _softened(weights, count, largest):
    """Weights [count] to their exponentials; returns the sum of these."""
    total = float32(0)
    for place in range(count):
        weights[place] = exp(weights[place] - largest)
        total += weights[place]
    return total


@njit(**_INLINE)
def _norm(x, weight, eps, normed):
    """RMS norm of x [D]."""
    squares = _product_of(x, x)
    scale = _ONE / math.sqrt(squares / float32(len(weight)) + eps)
    for index in range(len(weight)):
        normed[index] = x[index] * scale * weight[index]


@njit
def _take_normed(x, weight, eps, taken, sizes):
    """The norm of every column of x [C, D]."""
    normed = np.empty(x.shape[1], np.float32)
    for column in range(len(x)):
        _norm(x[column], weight, eps, normed)
        sizes[column] = _take(normed, taken[column])


@njit
def _turn(head, cos, sin):
    """Turn a query or key [d] by cos and sin [d] (see `torch_ops.rotate`)."""
    for index in range(0, len(head), 2):
        first, second = head[index], head[index + 1]
        head[index] = first * cos[index] + second * sin[index]
        head[index + 1] = second * cos[index + 1] + first * sin[index + 1]


@njit
def _heads(part, out, bias, cos, sin, queries, keys, values, position, linear):
    """A thread's part of queries [C, H, d], and of keys and values [h, T, d] from position on."""
    columns, heads, width = queries.shape
    local = len(keys)
    begin, end = share(heads + 2 * local, part)
    _product(begin * width, end * width, *linear, out)
    for head in range(begin, end):
        for column in range(columns):
            if head < heads:
                made = queries[column, head]
            elif head < heads + local:
                made = keys[head - heads, position + column]
            else:
                made = values[head - heads - local, position + column]
            for index in range(width):
                made[index] = out[column, head * width + index]
                if len(bias):
                    made[index] += bias[head * width + index]
            if head < heads + local:
                _turn(made, cos[column], sin[column])


@njit
def _attend(part, queries, keys, values, position, attended):
    """A thread's heads of the causal attention of queries [C, H, d] from the position on to keys
    and values [h, T, d]: attended [C, H * d]."""
    columns, heads, width = queries.shape
    shared = heads // len(keys)
    scale = _ONE / math.sqrt(float32(width))
    weights = np.empty(position + columns, np.float32)
    out = np.empty(width, np.float32)
    begin, end = share(heads, part)
    for head in range(begin, end):
        key, value = keys[head // shared], values[head // shared]
        for column in range(columns):
            length = position + column + 1
            largest = LEAST
            for place in range(length):
                weights[place] = _product_of(queries[column, head], key[place]) * scale
                largest = max(largest, weights[place])
            total = _softened(weights, length, largest)
            out[:] = float32(0)
            for place in range(length):
                for index in range(width):
                    out[index] += weights[place] * value[place, index]
            for index in range(width):
                attended[column, head * width + index] = out[index] / total


@njit
def _add(part, out, x, linear):
    """A thread's rows of a product, added to x [C, D]."""
    begin, end = share(x.shape[1], part)
    _product(begin, end, *linear, out)
    for column in range(len(x)):
        for index in range(begin, end):
            x[column, index] += out[column, index]


@njit
def _gate(part, out, hidden, linear):
    """A thread's part of SwiGLU, hidden [C, F]: of gates, and of what they let through."""
    width = hidden.shape[1]
    begin, end = share(width, part)
    _product(begin, end, *linear, out)
    _product(width + begin, width + end, *linear, out)
    for column in range(len(hidden)):
        for index in range(begin, end):
            hidden[column, index] = silu(out[column, index]) * out[column, width + index]


def _stack(
    place, size, sync, x, norms, eps, weights, scales, bias, cos, sin, keys, values, position,
    queries, attended, hidden,
):  # fmt: skip
    """x [C, D] through all blocks, in place.

    `norms` [L, 2, D]; `weights` and `scales` of wqkv, wo, w1 with w3, and w2 [L, N, K] and [L, N];
    `bias` [L, N] of wqkv, or [L, 0]; `cos` and `sin` [C, d]; `keys` and `values` [L, h, T, d],
    filled up to the position. What the threads share: `queries` [C, H, d], `attended` [C, H * d],
    `hidden` [C, F].
    """
    part, columns = (place, size), len(x)
    wqkv, wo, w13, w2 = weights
    sizes = np.empty(columns, np.float32)
    normed = _taken(columns, x.shape[1], wqkv)
    heads = _taken(columns, attended.shape[1], wo)
    gated = _taken(columns, hidden.shape[1], w2)
    widest = max(wqkv.shape[1], w13.shape[1], x.shape[1])
    out = np.empty((columns, widest), np.float32)
    for layer in range(len(wqkv)):
        _take_normed(x, norms[layer, 0], eps, normed, sizes)
        _heads(
            part, out, bias[layer], cos, sin, queries, keys[layer], values[layer], position,
            (wqkv[layer], scales[0][layer], normed, sizes),
        )  # fmt: skip
        meet(sync, size)
        _attend(part, queries, keys[layer], values[layer], position, attended)
        meet(sync, size)
        for column in range(columns):
            sizes[column] = _take(attended[column], heads[column])
        _add(part, out, x, (wo[layer], scales[1][layer], heads, sizes))
        meet(sync, size)
        _take_normed(x, norms[layer, 1], eps, normed, sizes)
        _gate(part, out, hidden, (w13[layer], scales[2][layer], normed, sizes))
        meet(sync, size)
        for column in range(columns):
            sizes[column] = _take(hidden[column], gated[column])
        _add(part, out, x, (w2[layer], scales[3][layer], gated, sizes))
        meet(sync, size)


def _head(place, size, sync, x, norm, eps, weights, scales, logits):
    """The last norm and a product: x [C, D] -> logits [C, N]."""
    sizes = np.empty(len(x), np.float32)
    taken = _taken(len(x), x.shape[1], weights)
    _take_normed(x, norm, eps, taken, sizes)
    begin, end = share(len(weights), (place, size))
    _product(begin, end, weights, scales, taken, sizes, logits)
    meet(sync, size)


@cache
def stack_of(kind: np.dtype) -> Callable:
    """`_stack` compiled for weights of a kind."""
    linears = types.UniTuple(types.Array(from_dtype(kind), 3, "C"), 4)
    return compiled(
        int64, int64, _SYNC, _MATRIX, _CUBE, float32, linears, types.UniTuple(_MATRIX, 4), _MATRIX,
        _MATRIX, _MATRIX, _CACHE, _CACHE, int64, _CUBE, _MATRIX, _MATRIX,
        kind=kind.name, fastmath=_ALIKE,
    )(_stack)  # fmt: skip


@cache
def head_of(kind: np.dtype) -> Callable:
    """`_head` compiled for weights of a kind."""
    weights = types.Array(from_dtype(kind), 2, "C")
    return compiled(
        int64, int64, _SYNC, _MATRIX, _VECTOR, float32, weights, _VECTOR, _MATRIX,
        kind=kind.name, fastmath=_ALIKE,
    )(_head)  # fmt: skip
