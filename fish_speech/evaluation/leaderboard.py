"""What was measured, as it is written to `leaderboard.json` and read from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fish_speech.files import read_json, write_json

JSON_NAME = "leaderboard.json"
MIN_SAMPLES = 3  # fewer give no interval


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` samples, with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def too_few(self) -> str:
        """What stands in place of an interval where the samples are too few for one, else ""."""
        return "" if self.n >= MIN_SAMPLES else "one sample" if self.n == 1 else f"{self.n} samples"


@dataclass
class ModelRow:
    """A model, or an anchor: its metrics by name, None where one can't be measured.

    `wer` `cer` `runaways` `empty` are proportions (0.25 is 25%), `similarity` is a cosine (-1..1),
    `speaking_rate` letters and digits a second of speech, `pitch_median` Hz, `pitch_range`
    semitones, losses nats a label; `..._referenced` is with a reference clip in front. `step` is
    None for what is no checkpoint, `error` why a model could not be measured.
    """

    name: str
    step: int | None = None
    path: str | None = None
    error: str | None = None
    figures: dict[str, Estimate | None] = field(default_factory=dict)

    def estimate(self, name: str) -> Estimate | None:
        return self.figures.get(name)


@dataclass
class SampleResult:
    """What one model made of one sample; `audio` is relative to the leaderboard's folder."""

    audio: str | None
    wer: float | None = None
    cer: float | None = None
    similarity: float | None = None
    heard: str | None = None
    runaway: bool = False
    empty: bool = False
    seconds: float = 0.0


@dataclass
class EvalSample:
    """A text, to be spoken with a reference clip in front (`referenced`) or without.

    `recording` is the path of the real clip where there is one; `spoken` is by row name.
    """

    name: str
    text: str
    referenced: bool
    recording: str | None = None
    spoken: dict[str, SampleResult] = field(default_factory=dict)


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
        what = f"use {label(self.choice)}" if self.verdict == "use" else self.verdict
        return f"{what}: {self.reason}\nnext: {self.next}"


@dataclass
class Leaderboard:
    """The rows (the base first, then checkpoints by step), the anchors, and every sample.

    The anchors (`scale`) are what the rows are read against: real clips, the same through the
    codec, and another speaker.
    """

    title: str
    recogniser: str | None
    normalisation: str
    speaker_encoder: str | None
    settings: dict[str, Any]
    recommendation: Recommendation
    rows: list[ModelRow]
    scale: list[ModelRow] = field(default_factory=list)
    samples: list[EvalSample] = field(default_factory=list)

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
                EvalSample(
                    **{
                        **sample,
                        "spoken": {k: SampleResult(**v) for k, v in sample["spoken"].items()},
                    }
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


def label(name: str) -> str:
    """A row's name for people.

    >>> label("step_000000300")
    'step 300'
    """
    step = re.fullmatch(r"step_0*(\d+)", name)
    return f"step {step[1]}" if step else name


def _rows(values: list[dict[str, Any]]) -> Iterator[ModelRow]:
    for row in values:
        figures = {k: v and Estimate(**v) for k, v in row.get("figures", {}).items()}
        yield ModelRow(**{**row, "figures": figures})
