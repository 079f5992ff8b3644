"""Metrics over steps, or by model where there are none, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from fish_speech.evaluation.leaderboard import Estimate, Leaderboard, ModelRow, label
from fish_speech.evaluation.metric_columns import COLUMNS, Column, is_chosen
from fish_speech.html_page import escape

_WIDTH, _HEIGHT = 420, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 408, 30, 220  # of the plot, in it
_LABEL_HEIGHT = 13
_COLUMNS = {column.name: column for column in COLUMNS}


@dataclass(frozen=True)
class Chart:
    """Some metrics that share an axis: `series` (name and metric), `anchors` that are drawn as
    dashed lines, `floor` where the axis must begin."""

    title: str
    series: Sequence[tuple[str, str]]
    anchors: Sequence[str] = ()
    floor: float | None = None


CHARTS = (
    Chart("Word errors", [("from text alone", "wer"), ("cloning", "wer_referenced")],
          ["recording", "recording through the codec"], floor=0),
    Chart("Similarity", [("from text alone", "similarity"), ("cloning", "similarity_referenced")],
          ["recording against recording", "recording through the codec", "another speaker"]),
    Chart("Loss", [("held out", "held_out_loss"), ("training", "training_loss")]),
)  # fmt: skip


def charts(board: Leaderboard) -> list[str]:
    """The charts that have anything to show, each a `<figure>`."""
    rows = [row for row in board.rows if row.error is None]
    drawn = [_chart(chart, rows, board) for chart in CHARTS]
    return [each for each in drawn if each]


def _chart(chart: Chart, rows: Sequence[ModelRow], board: Leaderboard) -> str:
    series = [(name, [(row, f) for row in rows if (f := row.estimate(key))], _COLUMNS[key])
              for name, key in chart.series]  # fmt: skip
    series = [each for each in series if each[1]]
    if not series:
        return ""
    column = series[0][2]
    anchors = [(row.name, f.mean) for row in board.scale
               if row.name in chart.anchors
               and (f := row.estimate(chart.series[0][1]))]  # fmt: skip
    values = [v for _, points, _ in series for _, f in points for v in (f.low, f.high)]
    values += [value for _, value in anchors] + ([] if chart.floor is None else [chart.floor])
    x_axis, y_axis = _XAxis(rows), _YAxis(values)
    parts = [_axes(x_axis, y_axis, column), *_anchor_lines(anchors, y_axis)]
    parts += [_chosen(x_axis.position(row)) for row in rows if is_chosen(board, row.name)]
    for index, (name, points, own) in enumerate(series):
        drawn = _series(points, x_axis, y_axis, own, index, len(series))
        parts.append(f"<g class='series s{index}'><title>{escape(name)}</title>{drawn}</g>")
    legend = "".join(
        f"<li class='s{index}'><svg viewBox='-8 -8 16 16' aria-hidden='true'>"
        f"{_marker(0, 0, index)}</svg>{escape(name)}</li>"
        for index, (name, _, _) in enumerate(series)
    )
    unit = f" <small>{column.unit}</small>" if column.unit else ""
    return (
        f"<figure class='chart'><figcaption><b>{chart.title}</b>{unit}<ul>{legend}</ul>"
        f"</figcaption><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='{chart.title} by model; the table above has the figures'>"
        f"{''.join(parts)}</svg></figure>"
    )


class _XAxis:
    """Steps where every model has one, else a position for each model."""

    def __init__(self, rows: Sequence[ModelRow]) -> None:
        steps = [row.step for row in rows]
        self.by_step = None not in steps and len(set(steps)) == len(steps) > 1
        self._rows = {id(row): index for index, row in enumerate(rows)}
        if self.by_step:
            self.ticks = [(f"{value:g}", self._at(value, max(steps)))
                          for value in nice_ticks(0, max(steps), 5)]  # fmt: skip
            self._last = max(steps)
        else:
            self.ticks = [(label(row.name), self.position(row)) for row in rows]

    def position(self, row: ModelRow) -> float:
        if self.by_step:
            return self._at(row.step, self._last)
        return _LEFT + (_RIGHT - _LEFT) * (self._rows[id(row)] + 0.5) / len(self._rows)

    def _at(self, step: float, last: float) -> float:
        return _LEFT + 8 + (_RIGHT - _LEFT - 16) * step / last


class _YAxis:
    """From one round number to another."""

    def __init__(self, values: Sequence[float]) -> None:
        self.ticks = nice_ticks(min(values), max(values), 4, outside=True)
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def position(self, value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - self._low) / (self._high - self._low)


def nice_ticks(low: float, high: float, about: int, outside: bool = False) -> list[float]:
    """About that many round ticks from `low` to `high`, or just beyond them (`outside`).

    >>> nice_ticks(0, 300, 3)
    [0.0, 100.0, 200.0, 300.0]
    """
    rough = (high - low or abs(high) or 1.0) / about
    power = 10 ** floor(log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * power - rough))
    first, last = (floor(low / step + 1e-9), ceil(high / step - 1e-9)) if outside else (
        ceil(low / step - 1e-9), floor(high / step + 1e-9))  # fmt: skip
    return [round(k * step, 10) for k in range(first, max(last, first + outside) + 1)]


def _axes(x_axis: _XAxis, y_axis: _YAxis, column: Column) -> str:
    lines = "".join(
        f"<path class='grid' d='M{_LEFT} {y:.1f}H{_RIGHT}'/>"
        f"<text class='tick' x='{_LEFT - 7}' y='{y + 4:.1f}' text-anchor='end'>"
        f"{_tick(value, y_axis.ticks, column)}</text>"
        for value in y_axis.ticks
        for y in [y_axis.position(value)]
    )
    names = "".join(
        f"<text class='tick' x='{x:.1f}' y='{_BOTTOM + 18}' text-anchor='middle'>"
        f"{escape(_truncated(name, len(x_axis.ticks)))}</text>"
        for name, x in x_axis.ticks
    )
    middle, below = (_LEFT + _RIGHT) / 2, _BOTTOM + 36
    under = (
        f"<text class='tick' x='{middle}' y='{below}' text-anchor='middle'>training steps</text>"
    )
    return lines + names + (under if x_axis.by_step else "")


def _tick(value: float, ticks: Sequence[float], column: Column) -> str:
    if column.percent:
        return column.show(value)
    digits = max(0, -floor(log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.{digits}f}".replace("-", "−")


def _truncated(name: str, count: int) -> str:
    room = max(4, 60 // count)
    return name if len(name) <= room else f"{name[: room - 1]}…"


def _anchor_lines(anchors: Sequence[tuple[str, float]], y_axis: _YAxis) -> list[str]:
    """Dashed lines with their names, which are moved apart where they would overlap."""
    found, above = [], float("-inf")
    for name, value in sorted(anchors, key=lambda anchor: -anchor[1]):
        y = y_axis.position(value)
        above = max(y - 5, above + _LABEL_HEIGHT)
        found.append(
            f"<g class='anchor'><path d='M{_LEFT} {y:.1f}H{_RIGHT}'/>"
            f"<text x='{_RIGHT}' y='{above:.1f}' text-anchor='end'>{escape(name)}</text></g>"
        )
    return found


def _chosen(x: float) -> str:
    return (
        f"<g class='chosen'><path d='M{x:.1f} {_TOP - 12}V{_BOTTOM}'/>"
        f"<text x='{x:.1f}' y='{_TOP - 16}' text-anchor='middle'>★</text></g>"
    )


def _series(
    points: Sequence[tuple[ModelRow, Estimate]], x_axis: _XAxis, y_axis: _YAxis, column: Column,
    index: int, count: int,
) -> str:  # fmt: skip
    # Without steps side by side, for they would hide each other.
    offset = 0.0 if x_axis.by_step else 14 * (index - (count - 1) / 2)
    positioned = [(x_axis.position(row) + offset, row, f) for row, f in points]
    parts = []
    if x_axis.by_step and len(positioned) > 1:
        upper = [f"{x:.1f},{y_axis.position(f.high):.1f}" for x, _, f in positioned]
        lower = [f"{x:.1f},{y_axis.position(f.low):.1f}" for x, _, f in reversed(positioned)]
        parts.append(f"<polygon class='band' points='{' '.join(upper + lower)}'/>")
        line = " ".join(f"{x:.1f},{y_axis.position(f.mean):.1f}" for x, _, f in positioned)
        parts.append(f"<polyline points='{line}'/>")
    else:
        parts += [
            f"<path class='whisker' d='M{x:.1f} {y_axis.position(f.low):.1f}"
            f"V{y_axis.position(f.high):.1f}'/>"
            for x, _, f in positioned
        ]
    for x, row, f in positioned:
        said = f"{label(row.name)}: {column.show(f.mean)} ({column.interval(f)})"
        marker = _marker(x, y_axis.position(f.mean), index)
        parts.append(f"<g>{marker}<title>{escape(said)}</title></g>")
    return "".join(parts)


def _marker(x: float, y: float, index: int) -> str:
    """A disc for the first series, a square for the second: told apart without colours."""
    if index == 0:
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4'/>"
    return f"<rect x='{x - 3.5:.1f}' y='{y - 3.5:.1f}' width='7' height='7'/>"
