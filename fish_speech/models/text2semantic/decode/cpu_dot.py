"""A row of weights times a column on a CPU, a cache line of weights after the other.

Of int8 two of Intel's cores read 13 GB/s as a compiler has the plain loop, 23 in this way, and 27,
all that their memory gives, where they ask ahead as well.
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
# AMD's cores ask ahead by themselves, and are slower where somebody else does.
_AMD = get_host_cpu_name().startswith(("znver", "amdfam", "bdver", "btver"))
_AHEAD = 2048 if platform.machine() in ("x86_64", "AMD64") and not _AMD else 0  # bytes
_LINES = {int8: 2, uint16: 1, float32: 2}  # at once
_WORD, _PLACE, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, 16), ir.VectorType(_FLOAT, 16)
_FAST = ("fast",)


def _loaded(builder: ir.IRBuilder, array: Any, place: Any, count: int) -> Any:
    """A vector of so many elements from a place on."""
    kind = ir.VectorType(array.type.pointee, count).as_pointer()
    return builder.load(builder.bitcast(builder.gep(array, [place]), kind), align=1)


def _ask(builder: ir.IRBuilder, array: Any, place: Any) -> None:
    """Ask for the line that follows a place by `_AHEAD` bytes, which may lie behind the array."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    at = builder.gep(builder.bitcast(builder.gep(array, [place]), byte), [_PLACE(_AHEAD)])
    builder.call(ask, [at, _WORD(0), _WORD(3), _WORD(1)])  # to read, into every cache


def _pairs(builder: ir.IRBuilder, sums: Any, weights: Any, taken: Any) -> Any:
    """Sums [16], and the products of int8 and int16 [32], two of them to each: what processors
    have an instruction for."""
    wide = ir.VectorType(_WORD, 32)
    products = builder.mul(builder.sext(weights, wide), builder.sext(taken, wide))
    none = ir.Constant(wide, ir.Undefined)
    first, second = (
        builder.shuffle_vector(products, none, ir.Constant(_WORDS, list(range(half, 32, 2))))
        for half in (0, 1)
    )
    return builder.add(sums, builder.add(first, second))


def _singles(builder: ir.IRBuilder, sums: Any, weights: Any, taken: Any) -> Any:
    """Sums [16], and the products of fp32, or bf16 as its bits, and fp32 [16]."""
    if weights.type != _FLOATS:
        bits = builder.shl(builder.zext(weights, _WORDS), ir.Constant(_WORDS, [16] * 16))
        weights = builder.bitcast(bits, _FLOATS)
    products = builder.fmul(weights, taken, flags=_FAST)
    return builder.fadd(sums, products, flags=_FAST)


@intrinsic
def _lines(context, weights, place, taken, at, count):
    """The sum of `count` weights from a place on, times what was taken from another on."""
    kind = weights.dtype
    whole = kind == int8
    add, part = (_pairs, 32) if whole else (_singles, 16)
    step = step_of(kind)

    def codegen(context, builder, signature, args):
        places, count = [args[1], args[3]], args[4]
        weights, taken = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)
        )
        vector = _WORDS if whole else _FLOATS
        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * 16))
            for _ in range(step // part)
        ]
        with cgutils.for_range_slice(builder, _PLACE(0), count, _PLACE(step), _PLACE) as (index, _):
            row, column = (builder.add(index, place) for place in places)
            for line in range(_LINES[kind] if _AHEAD else 0):
                _ask(builder, weights, builder.add(row, _PLACE(line * step // _LINES[kind])))
            for number, total in enumerate(sums):
                of_row, of_column = (
                    _loaded(builder, array, builder.add(start, _PLACE(number * part)), part)
                    for array, start in ((weights, row), (taken, column))
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

    return (int32 if whole else float32)(weights, int64, taken, int64, int64), codegen


def step_of(kind: Any) -> int:
    """Weights of a kind that `_lines` takes at once."""
    return _LINES[kind] * _LINE * 8 // kind.bitwidth


def dot(weights, number, taken, column):
    """A row of weights [N, K] times a row of `taken` [C, K], both in C's order, in fp32: int8 times
    int16, whose sum must fit into 32 bits, or fp32, or bf16 as its bits (uint16), times fp32."""


@njit(error_model="numpy")
def _of_bits(bits):
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@overload(dot, inline="always")
def _typed_dot(weights, number, taken, column):
    step = step_of(weights.dtype)
    value_of = {int8: int64, uint16: _of_bits, float32: float32}[weights.dtype]

    def lines_and_rest(weights, number, taken, column):
        width = weights.shape[1]
        most = width - width % step
        total = _lines(weights, number * width, taken, column * width, most)
        for index in range(most, width):
            total += value_of(weights[number, index]) * taken[column, index]
        return float32(total)

    return lines_and_rest
