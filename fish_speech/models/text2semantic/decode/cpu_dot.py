"""A dot product of a weight row and an input on a CPU, cache line by cache line.

Of int8 two of Intel's cores read 13 GB/s as a compiler has the plain loop, 23 in this way, and 27,
all that their memory gives, with software prefetching as well.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_name
from numba import float32, int8, int32, int64, njit, uint16
from numba.core import cgutils
from numba.extending import intrinsic, overload

_LINE = 64  # bytes
# AMD's cores prefetch by themselves, and are slower with more of it.
_AMD = get_host_cpu_name().startswith(("znver", "amdfam", "bdver", "btver"))
_PREFETCH_BYTES = 2048 if platform.machine() in ("x86_64", "AMD64") and not _AMD else 0  # bytes
_LINES = {int8: 2, uint16: 1, float32: 2}  # at once
_WORD, _PLACE, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, 16), ir.VectorType(_FLOAT, 16)
_FAST = ("fast",)


def _load(builder: ir.IRBuilder, array: Any, place: Any, count: int) -> Any:
    """A vector of so many elements from a place on."""
    kind = ir.VectorType(array.type.pointee, count).as_pointer()
    return builder.load(builder.bitcast(builder.gep(array, [place]), kind), align=1)


def _prefetch(builder: ir.IRBuilder, array: Any, place: Any) -> None:
    """Prefetch the line `_PREFETCH_BYTES` after a place, which may lie behind the array."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    at = builder.gep(builder.bitcast(builder.gep(array, [place]), byte), [_PLACE(_PREFETCH_BYTES)])
    builder.call(prefetch, [at, _WORD(0), _WORD(3), _WORD(1)])  # to read, into every cache


def _add_int8_products(builder: ir.IRBuilder, sums: Any, weights: Any, inputs: Any) -> Any:
    """Sums [16], and the products of int8 and int16 [32], two of them to each: what processors
    have an instruction for."""
    wide = ir.VectorType(_WORD, 32)
    products = builder.mul(builder.sext(weights, wide), builder.sext(inputs, wide))
    none = ir.Constant(wide, ir.Undefined)
    first, second = (
        builder.shuffle_vector(products, none, ir.Constant(_WORDS, list(range(half, 32, 2))))
        for half in (0, 1)
    )
    return builder.add(sums, builder.add(first, second))


def _add_float_products(builder: ir.IRBuilder, sums: Any, weights: Any, inputs: Any) -> Any:
    """Sums [16], and the products of fp32, or bf16 as its bits, and fp32 [16]."""
    if weights.type != _FLOATS:
        bits = builder.shl(builder.zext(weights, _WORDS), ir.Constant(_WORDS, [16] * 16))
        weights = builder.bitcast(bits, _FLOATS)
    products = builder.fmul(weights, inputs, flags=_FAST)
    return builder.fadd(sums, products, flags=_FAST)


@intrinsic
def _dot_lines(context, weights, place, inputs, at, count):
    """The dot product of `count` weights from `place` on and inputs from `at` on."""
    kind = weights.dtype
    whole = kind == int8
    add, part = (_add_int8_products, 32) if whole else (_add_float_products, 16)
    step = step_size(kind)

    def codegen(context, builder, signature, args):
        places, count = [args[1], args[3]], args[4]
        weights, inputs = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)
        )
        vector = _WORDS if whole else _FLOATS
        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * 16))
            for _ in range(step // part)
        ]
        with cgutils.for_range_slice(builder, _PLACE(0), count, _PLACE(step), _PLACE) as (index, _):
            row, column = (builder.add(index, place) for place in places)
            for line in range(_LINES[kind] if _PREFETCH_BYTES else 0):
                _prefetch(builder, weights, builder.add(row, _PLACE(line * step // _LINES[kind])))
            for number, total in enumerate(sums):
                of_row, of_column = (
                    _load(builder, array, builder.add(start, _PLACE(number * part)), part)
                    for array, start in ((weights, row), (inputs, column))
                )
                builder.store(add(builder, builder.load(total), of_row, of_column), total)
        total, *others = (builder.load(each) for each in sums)
        for other in others:
            more = builder.add if whole else builder.fadd
            total = more(total, other)
        name, one = ("add.v16i32", _WORD) if whole else ("fadd.v16f32", _FLOAT)
        start = [] if whole else [ir.Constant(_FLOAT, 0.0)]
        kinds = ir.FunctionType(one, [*(_FLOAT for _ in start), vector])
        join = cgutils.get_or_insert_function(builder.module, kinds, f"llvm.vector.reduce.{name}")
        return builder.call(join, [*start, total], fastmath=() if whole else _FAST)

    return (int32 if whole else float32)(weights, int64, inputs, int64, int64), codegen


def step_size(kind: Any) -> int:
    """Weights of a kind that `_dot_lines` takes at once."""
    return _LINES[kind] * _LINE * 8 // kind.bitwidth


def dot(weights, number, inputs, column):
    """The dot product of a row of weights [N, K] and a row of inputs [C, K], both C-contiguous, in
    fp32: int8 and int16, whose sum must fit into 32 bits, or fp32, or bf16 as its bits (uint16),
    and fp32."""


@njit(error_model="numpy")
def _bf16_value(bits):
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@overload(dot, inline="always")
def _typed_dot(weights, number, inputs, column):
    step = step_size(weights.dtype)
    value_of = {int8: int64, uint16: _bf16_value, float32: float32}[weights.dtype]

    def lines_and_rest(weights, number, inputs, column):
        width = weights.shape[1]
        most = width - width % step
        total = _dot_lines(weights, number * width, inputs, column * width, most)
        for index in range(most, width):
            total += value_of(weights[number, index]) * inputs[column, index]
        return float32(total)

    return lines_and_rest
