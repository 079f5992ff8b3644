"""What was measured, as it is written to `leaderboard.json` and read from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json

JSON_NAME = "leaderboard.json"
FEWEST = 3  # samples, below which nothing is certain


@dataclass(frozen=True)
class Figure:
    """A mean over `n` samples, with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def too_few(self) -> str:
        """What stands in place of an interval where the samples are too few for one, else ""."""
        return "" if self.n >= FEWEST else "one sample" if self.n == 1 else f"{self.n} samples"


@dataclass
class Row:
    """A model, or a line of the scale: its figures by name, None where one can't be measured.

    `wer` `cer` `runaways` `empty` are shares (0.25 is 25%), `similarity` is a cosine (-1..1),
    `speaking_rate` characters a second of speech, `pitch_median` Hz, `pitch_range` semitones,
    losses nats a label; `..._referenced` is with a reference clip in front. `step` is None for what
    is no checkpoint, `error` why a model could not be measured.
    """

    name: str
    step: int | None = None
    path: str | None = None
    error: str | None = None
    figures: dict[str, Figure | None] = field(default_factory=dict)

    def figure(self, name: str) -> Figure | None:
        return self.figures.get(name)


@dataclass
class Spoken:
    """How one model spoke one sample; `audio` is relative to the leaderboard's folder."""

    audio: str | None
    wer: float | None = None
    cer: float | None = None
    similarity: float | None = None
    heard: str | None = None
    runaway: bool = False
    empty: bool = False
    seconds: float = 0.0


@dataclass
class Sample:
    """A sentence and a way to speak it (with a reference clip in front or without).

    `recording` is the path of the real clip where there is one; `spoken` is by row name.
    """

    name: str
    text: str
    referenced: bool
    recording: str | None = None
    spoken: dict[str, Spoken] = field(default_factory=dict)


@dataclass(frozen=True)
class Recommendation:
    """Which row to use (None: none of them), why, and the command to give next.

    `verdict` is "use", "keep the base" or "train longer".
    """

    choice: str | None
    step: int | None
    verdict: str
    reason: str
    next: str

    def __str__(self) -> str:
        what = f"use {self.choice}" if self.verdict == "use" else self.verdict
        return f"{what}: {self.reason}\nnext: {self.next}"


@dataclass
class Leaderboard:
    """The rows (the base first, then checkpoints by step), the scale, and every sample."""

    title: str
    recogniser: str | None
    normalisation: str
    speaker_encoder: str | None
    settings: dict[str, Any]
    recommendation: Recommendation
    rows: list[Row]
    scale: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Leaderboard:
        """What `to_json` gave. Raises `TypeError` or `KeyError` where it is something else."""
        made = {
            "recommendation": Recommendation(**values["recommendation"]),
            "rows": list(_rows(values["rows"])),
            "scale": list(_rows(values.get("scale", []))),
            "samples": [
                Sample(
                    **{**sample, "spoken": {k: Spoken(**v) for k, v in sample["spoken"].items()}}
                )
                for sample in values.get("samples", [])
            ],
        }
        return cls(**{**values, **made})

    def write(self, folder: str | Path) -> Path:
        """Write `leaderboard.json` into a folder, atomically."""
        path = Path(folder) / JSON_NAME
        write_json(path, self.to_json())
        return path

    @classmethod
    def read(cls, path: str | Path) -> Leaderboard:
        """Read a `leaderboard.json`. Raises `ValueError` that names it where it is none."""
        values = read_json(path)
        try:
            return cls.from_json(values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a leaderboard ({error}); evaluate again") from error


def _rows(values: list[dict[str, Any]]) -> Iterator[Row]:
    for row in values:
        figures = {k: v and Figure(**v) for k, v in row.get("figures", {}).items()}
        yield Row(**{**row, "figures": figures})
