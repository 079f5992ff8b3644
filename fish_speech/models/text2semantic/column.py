"""What lies between the products of one or a few columns on a CPU, compiled by numba.

As tensor operations it takes half as long as the products themselves, only for being called. Here
`out` [C, P, N] is what a product gave and `rows` [C, P, K] what the next one takes, each of the C
columns in P parts (see `Int8Linear`): one part is the column itself, of two the second is what
rounding has left of the first, magnified. `sizes` [C] bring the product to scale.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, float64, int64, njit, void

STEPS = 63  # either way, of an input: 127 * 127 * 2 still fits the 16 bits that CPUs sum pairs in
MAGNIFIED = 2 * STEPS  # how much what rounding leaves, half a step at most, is magnified

_STEPS, _REST = float32(STEPS), float32(1 / MAGNIFIED)
_ONE, _TINY, _LEAST = float32(1), float32(1e-12), float32(-3e38)
_HALVINGS = 32  # of the distance to a threshold
_LOG2_E, _LARGEST = float32(math.log2(math.e)), float32(126)
_VECTOR, _MATRIX, _CUBE = float32[::1], float32[:, ::1], float32[:, :, ::1]
_INLINE = {"inline": "always", "error_model": "numpy"}


def _compiled(*signature):
    """Compiled when it is first imported, and kept for the next time where that can be written."""

    def compile_function(function):
        options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
        try:
            return njit(*signature, cache=True, **options)(function)
        except Exception:  # no folder to keep it in, no room there, or what is there is broken
            return njit(*signature, **options)(function)

    return compile_function


@njit(**_INLINE)
def _value(out, index, size):
    """An element of a product."""
    if len(out) == 1:
        return out[0, index]
    return size * (out[0, index] + _REST * out[1, index])


@njit(**_INLINE)
def _part(rows):
    """Split the column in the first of two rows."""
    if len(rows) == 1:
        return _ONE
    column, rest = rows[0], rows[1]
    size = _TINY
    for index in range(len(column)):
        size = max(size, abs(column[index]))
    scale = _STEPS / size
    for index in range(len(column)):
        value = column[index] * scale
        rounded = np.rint(value)
        column[index] = rounded
        rest[index] = (value - rounded) * float32(MAGNIFIED)
    return size


@njit(**_INLINE)
def _exp(x):
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


@_compiled(void(_MATRIX, _VECTOR, float32, _CUBE, _VECTOR))
def norm(x, weight, eps, rows, sizes):
    """RMS norm of x [C, D] into rows."""
    for column in range(len(x)):
        squares = float32(0)
        for index in range(len(weight)):
            squares += x[column, index] * x[column, index]
        scale = _ONE / math.sqrt(squares / float32(len(weight)) + eps)
        for index in range(len(weight)):
            rows[column, 0, index] = x[column, index] * scale * weight[index]
        sizes[column] = _part(rows[column])


@_compiled(void(_MATRIX, _CUBE, _VECTOR, _MATRIX))
def add(x, out, sizes, total):
    """x [C, D] + the product, into total [C, D]."""
    for column in range(len(x)):
        for index in range(x.shape[1]):
            total[column, index] = x[column, index] + _value(out[column], index, sizes[column])


@_compiled(void(_MATRIX, _CUBE, _VECTOR))
def take(x, rows, sizes):
    """x [C, D] into rows."""
    for column in range(len(x)):
        rows[column, 0] = x[column]
        sizes[column] = _part(rows[column])


@_compiled(void(_CUBE, _VECTOR, _CUBE))
def gate(out, sizes, rows):
    """SwiGLU: the product is a gate and what it lets through, [C, P, 2 D], into rows [C, P, D]."""
    width = rows.shape[2]
    for column in range(len(out)):
        both, size, row = out[column], sizes[column], rows[column, 0]
        for index in range(width):
            closed = _value(both, index, size)
            row[index] = closed / (_ONE + _exp(-closed)) * _value(both, width + index, size)
        sizes[column] = _part(rows[column])


@_compiled(void(_CUBE, _VECTOR, _VECTOR, _MATRIX, _MATRIX, _CUBE, _CUBE, _CUBE, int64))
def rotate(out, sizes, bias, cos, sin, queries, keys, values, position):
    """Turn the queries and keys of a product by cos and sin [C, d] (see `llama.rotate`): writes
    queries [C, H, d], and keys and values [h, T, d] from the position on."""
    columns, heads, width = queries.shape
    for column in range(columns):
        place = position + column
        for head in range(heads + 2 * len(keys)):
            if head < heads:
                turned = queries[column, head]
            elif head < heads + len(keys):
                turned = keys[head - heads, place]
            else:
                turned = values[head - heads - len(keys), place]
            for index in range(width):
                turned[index] = _value(out[column], head * width + index, sizes[column])
                if len(bias):
                    turned[index] += bias[head * width + index]
            if head < heads + len(keys):
                for index in range(0, width, 2):
                    first, second = turned[index], turned[index + 1]
                    turned[index] = first * cos[column, index] + second * sin[column, index]
                    index += 1
                    turned[index] = second * cos[column, index] + first * sin[column, index]


@_compiled(void(_CUBE, _CUBE, _CUBE, int64, _CUBE, _VECTOR))
def attend(queries, keys, values, position, rows, sizes):
    """Causal attention of queries [C, H, d] from the position on to keys and values [h, T, d]."""
    columns, heads, width = queries.shape
    shared = heads // len(keys)
    scale = _ONE / math.sqrt(float32(width))
    weights = np.empty(position + columns, np.float32)
    for column in range(columns):
        length = position + column + 1
        for head in range(heads):
            query, key, value = queries[column, head], keys[head // shared], values[head // shared]
            largest = _LEAST
            for place in range(length):
                alike = float32(0)
                for index in range(width):
                    alike += query[index] * key[place, index]
                weights[place] = alike * scale
                largest = max(largest, weights[place])
            total = float32(0)
            for place in range(length):
                weights[place] = _exp(weights[place] - largest)
                total += weights[place]
            out = rows[column, 0, head * width : (head + 1) * width]
            out[:] = float32(0)
            for place in range(length):
                weight = weights[place] / total
                for index in range(width):
                    out[index] += weight * value[place, index]
        sizes[column] = _part(rows[column])


@_compiled(int64(_VECTOR, int64[::1], float32, float32, float32, float64))
def draw(logits, previous, penalty, top_p, temperature, number):
    """The id that a number above 0, at most 1, draws from logits [V] (see `inference.sampling`)."""
    scores = logits.copy()
    for index in previous:  # those that repeat are changed once
        score = logits[index]
        scores[index] = score * penalty if score < 0 else score / penalty
    largest = _LEAST
    for index in range(len(scores)):
        largest = max(largest, scores[index])
    weights, total = np.empty_like(scores), float32(0)
    for index in range(len(scores)):
        weights[index] = _exp(scores[index] - largest)
        total += weights[index]
    # The least weight that stays: of those from it on, the sum is within top-p.
    least, below = _ONE, float32(0)
    for _ in range(_HALVINGS if top_p < _ONE else 0):
        middle = (least + below) / float32(2)
        above = float32(0)
        for index in range(len(weights)):
            above += weights[index] if weights[index] >= middle else float32(0)
        if above <= top_p * total:
            least = middle
        else:
            below = middle
    total = float32(0)
    for index in range(len(weights)):
        stays = top_p >= _ONE or weights[index] >= least
        weights[index] = _exp((scores[index] - largest) / temperature) if stays else float32(0)
        total += weights[index]
    passed, last = float64(0), 0
    for index in range(len(weights)):
        if weights[index] > 0:
            passed, last = passed + float64(weights[index]), index
            if passed >= number * float64(total):
                break
    return last
