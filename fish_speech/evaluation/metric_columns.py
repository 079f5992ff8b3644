"""Titles, units and formats of the metrics: what the page and the table in Markdown share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fish_speech.evaluation.leaderboard import (
    Estimate,
    Leaderboard,
    ModelRow,
    Recommendation,
    label,
)


@dataclass(frozen=True)
class Column:
    """A metric as people read it; `best` is "low" or "high", None where neither end is good."""

    name: str
    title: str
    unit: str
    best: str | None
    meaning: str
    digits: int = 2
    percent: bool = False

    def show(self, value: float) -> str:
        shown = f"{100 * value:.0f}%" if self.percent else f"{value:.{self.digits}f}"
        return shown.replace("-", "−")

    def interval(self, estimate: Estimate) -> str:
        """The ends of the interval, with the unit once."""
        if estimate.too_few:
            return estimate.too_few
        low, high = self.show(estimate.low), self.show(estimate.high)
        return f"{low.removesuffix('%')} to {high}"


def _percentage(name: str, title: str, meaning: str) -> Column:
    return Column(name, title, "", "low", meaning, percent=True)


COLUMNS = (
    _percentage(
        "wer", "Word errors", "words that the recogniser did not hear as they were written"
    ),
    _percentage("cer", "Letter errors", "the same, counted in letters and digits"),
    Column("similarity", "Similarity", "cosine", "high",
           "how like the voice's real clips it sounds to a speaker encoder; 1 is the same"),
    _percentage("wer_referenced", "Word errors, cloning", "with a reference clip in front"),
    _percentage("cer_referenced", "Letter errors, cloning", "with a reference clip in front"),
    Column("similarity_referenced", "Similarity, cloning", "cosine", "high",
           "with a reference clip in front"),
    _percentage("runaways", "Runs on", "speech that did not end by itself"),
    _percentage("empty", "Says nothing", "texts that came out as silence"),
    Column("speaking_rate", "Pace", "letters/s", None, "letters a second of speech", digits=1),
    Column("pitch_median", "Pitch", "Hz", None, "the median of each clip", digits=0),
    Column("pitch_range", "Pitch range", "semitones", None, "how lively the melody is", digits=1),
    Column("held_out_loss", "Held-out loss", "nats", "low",
           "how little it expects clips that it was not trained on", digits=3),
    Column("training_loss", "Training loss", "nats", "low",
           "how little it expects what it was trained on, before the checkpoint", digits=3),
)  # fmt: skip


def measured_columns(board: Leaderboard) -> list[Column]:
    """The columns in which any model has an estimate."""
    return [column for column in COLUMNS if any(row.estimate(column.name) for row in board.rows)]


def measured_anchors(board: Leaderboard) -> list[ModelRow]:
    """The anchors that have any estimate."""
    return [row for row in board.scale if any(row.figures.values())]


def is_chosen(board: Leaderboard, name: str) -> bool:
    """Whether it is the row to use."""
    return board.recommendation.verdict == "use" and board.recommendation.choice == name


def verdict(recommendation: Recommendation) -> str:
    """The recommendation without its reason."""
    choice = recommendation.choice and label(recommendation.choice)
    if recommendation.verdict == "use" and choice:
        return f"Use {choice}"
    if recommendation.verdict == "keep the base" and choice not in (None, "base"):
        return f"Keep {choice}"
    return recommendation.verdict.capitalize()


def reason(board: Leaderboard) -> str:
    """Why, as a sentence."""
    said = board.recommendation.reason
    for row in board.rows:
        said = said.replace(row.name, label(row.name))
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def footnotes(board: Leaderboard) -> list[str]:
    """What one must know to read the table, a sentence each."""
    shown = ", ".join(f"{name.replace('_', ' ')} {v:g}" for name, v in _numbers(board.settings))
    found = [f"Every model speaks the same texts at the first try ({shown})." if shown else ""]
    if board.recogniser:
        found.append(
            f"Errors are what {board.recogniser} hears; both texts: {board.normalisation}."
        )
    else:
        found.append("No recogniser understands these texts, so no errors were counted.")
    if board.speaker_encoder:
        found.append(f"Similarity is by {board.speaker_encoder}.")
    found.append(
        "Ranges are 95% confidence intervals over the texts "
        "(Student's t; Wilson's for proportions)."
    )
    return [note for note in found if note]


def _numbers(settings: dict) -> list[tuple[str, float]]:
    return [(name, v) for name, v in settings.items() if isinstance(v, int | float)]


def markdown(board: Leaderboard) -> str:
    """The recommendation and the table, for a README or an issue."""
    columns = measured_columns(board)
    titles = [f"{c.title} ({c.unit})" if c.unit else c.title for c in columns]
    lines = [["", *titles], ["---", *("--:" for _ in columns)]]
    rows = [(row, is_chosen(board, row.name), False) for row in board.rows]
    rows += [(row, False, True) for row in measured_anchors(board)]
    for row, chosen, is_anchor in rows:
        name = _cell(label(row.name))
        name = f"**{name}** ★" if chosen else f"*{name}*" if is_anchor else name
        if row.error is not None:
            cells = [f"could not be measured: {_cell(row.error)}", *[""] * (len(columns) - 1)]
        else:
            cells = [
                f"{c.show(f.mean)} ({c.interval(f)})" if (f := row.estimate(c.name)) else ""
                for c in columns
            ]
        lines.append([name, *cells])
    advice = board.recommendation
    return "\n".join(
        [
            f"## {_cell(board.title)}: {_cell(verdict(advice)).lower()}",
            "",
            _cell(reason(board)),
            *(["", "```bash", advice.next, "```"] if advice.next else []),
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            _cell(" ".join(footnotes(board))),
            "",
        ]
    )


def _cell(words: str) -> str:
    """`words` on one line, escaped for Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(words.split()))
