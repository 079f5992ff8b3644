"""One or a few positions through a stack of transformer blocks on a CPU, compiled by numba.

There a frame costs reading every weight once, and calling an operation takes as long as reading a
quarter of a megabyte. So all blocks are one call, in which the threads of a `Team` share the rows
of every product. Weights are fp32, bf16 as its bits (uint16), or int8 with a scale for each row.

Shapes: C positions, L layers, D `dim`, H heads and h key/value heads of d, T positions of the
cache, F `intermediate_size`.
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
_TILE = 16  # rows, which stay in a core's cache while positions pass
# Whether a loop is vectorized depends on the addresses of its arrays. Results must not, or a seed
# would speak otherwise from one start to the next: no reassociation, no reciprocals.
_REPRODUCIBLE = {"nnan", "ninf", "nsz", "contract"}


def compiled(*takes, gives=types.void, kind="", fastmath=True):
    """JIT-compile a function, and cache it on disk where that can be written.

    numba renews what it cached only when the function's own file changes. So the cached name has a
    checksum of this file, from which others inline functions, and of `cpu_dot.py`, and the `kind`
    of weights.
    """
    content = crc32(Path(dots.__file__).read_bytes(), crc32(Path(__file__).read_bytes()))

    def compile_function(function):
        options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}
        name = function.__qualname__
        for attempt in ("", "_again"):  # the second where the cached one is broken
            try:
                function.__qualname__ = f"{name}_{kind}_{content:08x}{attempt}"
                return njit(gives(*takes), cache=True, **options)(function)
            except Exception:  # that, or no folder to keep it in, or no room there
                continue
            finally:
                function.__qualname__ = name
        return njit(gives(*takes), **options)(function)

    return compile_function


# Elements of `sync`, each on a cache line of its own: how many threads have arrived, how often all
# have, and whether nobody may wait any longer.
_ARRIVED, _GENERATION, ABORTED = 0, 16, 32
SYNC_SIZE = 48
_SPINS = 2000  # spins, some microseconds, before the processor is offered to others

_SYNC = int64[::1]
_yield = types.ExternalFunction(
    "SwitchToThread" if os.name == "nt" else "sched_yield", types.int32()
)


def _atomic(build: Callable) -> Any:
    """An operation on an element of `sync` that all threads see in the same order."""

    @intrinsic
    def operation(context, sync, offset, value):
        def codegen(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            pointer = cgutils.gep(builder, array.data, args[1])
            return build(builder, pointer, args[2])

        return int64(sync, int64, int64), codegen

    return operation


_fetch_add = _atomic(lambda builder, at, value: builder.atomic_rmw("add", at, value, "seq_cst"))
_exchange = _atomic(lambda builder, at, value: builder.atomic_rmw("xchg", at, value, "seq_cst"))
_load = _atomic(lambda builder, at, _: builder.load_atomic(at, "seq_cst", 8, typ=ir.IntType(64)))


@njit
def barrier(sync, size):
    """Wait for all threads; what each wrote before, all may read after."""
    if size == 1:
        return
    now = _load(sync, _GENERATION, 0)
    if _fetch_add(sync, _ARRIVED, 1) == size - 1:
        _exchange(sync, _ARRIVED, 0)
        _fetch_add(sync, _GENERATION, 1)
        return
    spins = 0
    while _load(sync, _GENERATION, 0) == now and _load(sync, ABORTED, 0) == 0:
        spins += 1
        if spins > _SPINS:
            _yield()


@njit
def partition(count, part):
    """Which of `count` things are a thread's: the first, and the one behind the last. `part` is
    its rank, and the number of threads."""
    rank, size = part
    return count * rank // size, count * (rank + 1) // size


def _input_buffer(columns, width, weights):
    """A buffer for inputs [C, width] in the type that weights of a kind are multiplied with."""


@overload(_input_buffer)
def _typed_buffer(columns, width, weights):
    kind = np.int16 if weights.dtype == int8 else np.float32
    return lambda columns, width, weights: np.empty((columns, width), kind)


def _load_input(x, row):
    """x [K] into a row of `_input_buffer`, quantized for int8 weights; returns its scale."""


@overload(_load_input)
def _typed_load(x, row):
    def steps(x, row):
        # As many bits as the sum of all products leaves in 32: 12 of K = 4096.
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
def _matmul(begin, end, weights, scales, inputs, sizes, out):
    """Rows of weights [N, K] times inputs [C, K], into out [C, N]."""
    for low in range(begin, end, _TILE):
        for column in range(len(inputs)):
            for number in range(low, min(end, low + _TILE)):
                value = dot(weights, number, inputs, column)
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
def _dot(x, y):
    """The dot product of x and y [N]."""
    total = float32(0)
    for index in range(len(x)):
        total += x[index] * y[index]
    return total


@njit(fastmath=True)
def _exp_sum(weights, count, largest):
    """Replace weights [count] by exp(weights - largest); returns their sum."""
    total = float32(0)
    for place in range(count):
        weights[place] = exp(weights[place] - largest)
        total += weights[place]
    return total


@njit(**_INLINE)
def _norm(x, weight, eps, normed):
    """RMS norm of x [D]."""
    squares = _dot(x, x)
    scale = _ONE / math.sqrt(squares / float32(len(weight)) + eps)
    for index in range(len(weight)):
        normed[index] = x[index] * scale * weight[index]


@njit
def _load_normed(x, weight, eps, inputs, sizes):
    """The norm of every column of x [C, D]."""
    normed = np.empty(x.shape[1], np.float32)
    for column in range(len(x)):
        _norm(x[column], weight, eps, normed)
        sizes[column] = _load_input(normed, inputs[column])


@njit
def _rope(head, cos, sin):
    """Rotate a query or key [d] by cos and sin [d] (see `torch_ops.rotate`)."""
    for index in range(0, len(head), 2):
        first, second = head[index], head[index + 1]
        head[index] = first * cos[index] + second * sin[index]
        head[index + 1] = second * cos[index + 1] + first * sin[index + 1]


@njit
def _qkv(part, out, bias, cos, sin, queries, keys, values, position, linear):
    """A thread's heads of queries [C, H, d], and of keys and values [h, T, d] from position on."""
    columns, heads, width = queries.shape
    local = len(keys)
    begin, end = partition(heads + 2 * local, part)
    _matmul(begin * width, end * width, *linear, out)
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
                _rope(made, cos[column], sin[column])


@njit
def _attention(part, queries, keys, values, position, context):
    """A thread's heads of the causal attention of queries [C, H, d] from the position on to keys
    and values [h, T, d]: context [C, H * d]."""
    columns, heads, width = queries.shape
    shared = heads // len(keys)
    scale = _ONE / math.sqrt(float32(width))
    weights = np.empty(position + columns, np.float32)
    out = np.empty(width, np.float32)
    begin, end = partition(heads, part)
    for head in range(begin, end):
        key, value = keys[head // shared], values[head // shared]
        for column in range(columns):
            length = position + column + 1
            largest = LEAST
            for place in range(length):
                weights[place] = _dot(queries[column, head], key[place]) * scale
                largest = max(largest, weights[place])
            total = _exp_sum(weights, length, largest)
            out[:] = float32(0)
            for place in range(length):
                for index in range(width):
                    out[index] += weights[place] * value[place, index]
            for index in range(width):
                context[column, head * width + index] = out[index] / total


@njit
def _project(part, out, x, linear):
    """A thread's rows of a product, added to x [C, D]."""
    begin, end = partition(x.shape[1], part)
    _matmul(begin, end, *linear, out)
    for column in range(len(x)):
        for index in range(begin, end):
            x[column, index] += out[column, index]


@njit
def _swiglu(part, out, hidden, linear):
    """A thread's part of SwiGLU before its last product, hidden [C, F]."""
    width = hidden.shape[1]
    begin, end = partition(width, part)
    _matmul(begin, end, *linear, out)
    _matmul(width + begin, width + end, *linear, out)
    for column in range(len(hidden)):
        for index in range(begin, end):
            hidden[column, index] = silu(out[column, index]) * out[column, width + index]


def _stack(
    rank, size, sync, x, norms, eps, weights, scales, bias, cos, sin, keys, values, position,
    queries, context, hidden,
):  # fmt: skip
    """x [C, D] through all blocks, in place.

    `norms` [L, 2, D]; `weights` and `scales` of wqkv, wo, w1 with w3, and w2 [L, N, K] and [L, N];
    `bias` [L, N] of wqkv, or [L, 0]; `cos` and `sin` [C, d]; `keys` and `values` [L, h, T, d],
    filled up to the position. Shared by the threads: `queries` [C, H, d], `context` [C, H * d],
    `hidden` [C, F].
    """
    part, columns = (rank, size), len(x)
    wqkv, wo, w13, w2 = weights
    sizes = np.empty(columns, np.float32)
    normed = _input_buffer(columns, x.shape[1], wqkv)
    heads = _input_buffer(columns, context.shape[1], wo)
    gated = _input_buffer(columns, hidden.shape[1], w2)
    widest = max(wqkv.shape[1], w13.shape[1], x.shape[1])
    out = np.empty((columns, widest), np.float32)
    for layer in range(len(wqkv)):
        _load_normed(x, norms[layer, 0], eps, normed, sizes)
        _qkv(
            part, out, bias[layer], cos, sin, queries, keys[layer], values[layer], position,
            (wqkv[layer], scales[0][layer], normed, sizes),
        )  # fmt: skip
        barrier(sync, size)
        _attention(part, queries, keys[layer], values[layer], position, context)
        barrier(sync, size)
        for column in range(columns):
            sizes[column] = _load_input(context[column], heads[column])
        _project(part, out, x, (wo[layer], scales[1][layer], heads, sizes))
        barrier(sync, size)
        _load_normed(x, norms[layer, 1], eps, normed, sizes)
        _swiglu(part, out, hidden, (w13[layer], scales[2][layer], normed, sizes))
        barrier(sync, size)
        for column in range(columns):
            sizes[column] = _load_input(hidden[column], gated[column])
        _project(part, out, x, (w2[layer], scales[3][layer], gated, sizes))
        barrier(sync, size)


def _head(rank, size, sync, x, norm, eps, weights, scales, logits):
    """The last norm and a product: x [C, D] -> logits [C, N]."""
    sizes = np.empty(len(x), np.float32)
    inputs = _input_buffer(len(x), x.shape[1], weights)
    _load_normed(x, norm, eps, inputs, sizes)
    begin, end = partition(len(weights), (rank, size))
    _matmul(begin, end, weights, scales, inputs, sizes, logits)
    barrier(sync, size)


@cache
def compile_stack(kind: np.dtype) -> Callable:
    """`_stack` compiled for weights of a kind."""
    linears = types.UniTuple(types.Array(from_dtype(kind), 3, "C"), 4)
    return compiled(
        int64, int64, _SYNC, _MATRIX, _CUBE, float32, linears, types.UniTuple(_MATRIX, 4), _MATRIX,
        _MATRIX, _MATRIX, _CACHE, _CACHE, int64, _CUBE, _MATRIX, _MATRIX,
        kind=kind.name, fastmath=_REPRODUCIBLE,
    )(_stack)  # fmt: skip


@cache
def compile_head(kind: np.dtype) -> Callable:
    """`_head` compiled for weights of a kind."""
    weights = types.Array(from_dtype(kind), 2, "C")
    return compiled(
        int64, int64, _SYNC, _MATRIX, _VECTOR, float32, weights, _VECTOR, _MATRIX,
        kind=kind.name, fastmath=_REPRODUCIBLE,
    )(_head)  # fmt: skip
