"""Which row to use, and why: decided by paired differences over the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote

from fish_speech.evaluation.intervals import difference
from fish_speech.evaluation.leaderboard import FEWEST, Recommendation, Row, Sample, Spoken
from fish_speech.preparation.error_rates import normal_words


@dataclass(frozen=True)
class Commands:
    """What to give next: `use` (with `{path}` for the chosen row's), `train_longer`, `keep`, and
    `gentler` where there is a training that costs fewer words."""

    use: str
    train_longer: str
    keep: str
    gentler: str | None = None


def literal(words: str) -> str:
    """Words that stand in `Commands.use` as they are, whatever braces they have."""
    return words.replace("{", "{{").replace("}", "}}")


def recommend(rows: Sequence[Row], samples: Sequence[Sample], commands: Commands) -> Recommendation:
    """The earliest row that no later one beats on similarity beyond the interval, among those that
    beat the base and whose error rate is no worse than the base's beyond the interval.

    "Beyond the interval": the 95% interval of the difference, over the samples that both spoke,
    leaves out zero; for the gains over the base it is that all of them hold at 95% together, for of
    many rows that are no better one would seem so. A row that is not more like the voice than the
    base is not worth using: then "train longer" where the held-out loss still falls, else "keep the
    base". Without similarities error rates decide; without a recogniser, runaways and empty outputs
    take their place.
    """
    compare = _Comparison(samples)
    base, *others = rows
    measured = [row for row in others if row.error is None]
    if base.error or not measured:
        what = "the base could not" if base.error else "no checkpoint could"
        return _keep(base, f"{what} be measured", commands)
    sound = [row for row in measured if not compare.worse_words(row, base)]
    if not sound:
        reason = f"every checkpoint {compare.loses}, beyond the interval"
        if commands.gentler:
            reason += "; adapting the fast transformer alone costs fewer words"
        command = commands.gentler or commands.keep
        return Recommendation(base.name, base.step, "keep the base", reason, command)
    if compare.count < FEWEST:
        return _keep(base, f"too few different texts to tell: {compare.count}", commands)
    better = compare.all_better(measured, base)
    gains = [row for row in sound if row in better]
    if gains:
        best = next(
            row
            for index, row in enumerate(gains)
            if not any(compare.better(later, row) for later in gains[index + 1 :])
        )
        return _use(best, base, sound, measured, compare, commands)
    last = sound[-1]
    falling = last is measured[-1] and _loss_falls([base, *measured])
    gain = f"no checkpoint {compare.wins} the base beyond the interval"
    costly = [row.name for row in better if row not in sound]
    if costly:
        gain += f" (except {', '.join(costly)}: each {compare.loses})"
    if falling:
        reason = f"{gain} yet, and the held-out loss still falls"
        return Recommendation(None, None, "train longer", reason, commands.train_longer)
    return _keep(base, gain, commands)


def prefer(a: Row, b: Row, samples: Sequence[Sample], commands: Commands) -> Recommendation:
    """Which of two models to use, by the same rules; `a` where neither is better."""
    compare = _Comparison(samples)
    for one, other in ((b, a), (a, b)):
        if one.error is not None:
            continue
        if other.error is not None:
            reason = f"{other.name} could not be measured"
        elif compare.better(one, other) and not compare.worse_words(one, other):
            reason = f"{one.name} {compare.wins} {other.name} ({compare.show(one, other)})"
        elif (
            compare.by_voice and compare.worse_words(other, one) and not compare.better(other, one)
        ):
            words = compare.show(one, other, "wer")
            reason = f"{one.name} makes fewer word errors than {other.name} ({words})"
        else:
            continue
        path = quote(str(one.path))
        return Recommendation(one.name, one.step, "use", reason, commands.use.format(path=path))
    if a.error is not None:
        reason = "neither could be measured"
    elif compare.count < FEWEST:
        reason = f"too few different texts to tell: {compare.count}"
    elif gained := [row.name for row in (a, b) if compare.better(row, b if row is a else a)]:
        reason = f"{gained[0]} is more like the voice, and makes more word errors"
    else:
        reason = "neither is better than the other beyond the interval"
    return _keep(a, reason, commands)


def _use(
    best: Row, base: Row, sound: list[Row], measured: list[Row], compare: _Comparison,
    commands: Commands,
) -> Recommendation:  # fmt: skip
    reason = f"{best.name} {compare.wins} the base ({compare.show(best, base)})"
    if compare.by_voice and compare.words_count:
        words = compare.show(best, base, "wer")
        reason += f", its error rate is no worse beyond the interval ({words})"
    if best is not sound[-1]:
        reason += ", and no later one is better beyond the interval"
    elif best is not measured[-1]:
        reason += f"; each later one {compare.loses}"
    elif len(sound) > 1 and compare.better(best, sound[-2]):
        reason += "; it is the last and still getting better: a higher --max-steps may help"
    if len(measured) == 1:
        reason += "; it is the only checkpoint: a lower --save-every gives more to choose from"
    next_command = commands.use.format(path=quote(str(best.path)))
    return Recommendation(best.name, best.step, "use", reason, next_command)


def _keep(base: Row, reason: str, commands: Commands) -> Recommendation:
    return Recommendation(base.name, base.step, "keep the base", reason, commands.keep)


def _loss_falls(rows: list[Row]) -> bool:
    """Whether the last row's held-out loss is the lowest of all."""
    losses = [figure.mean for row in rows if (figure := row.figure("held_out_loss"))]
    return len(losses) > 1 and losses[-1] < min(losses[:-1])


class _Comparison:
    """Rows against each other, sample by sample; samples without a reference count, where any."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = [sample for sample in samples if not sample.referenced] or list(samples)
        everything = [spoken for sample in self._samples for spoken in sample.spoken.values()]
        self.by_voice = any(spoken.similarity is not None for spoken in everything)
        self.words_count = any(spoken.wer is not None for spoken in everything)
        self.count = len({sample.text for sample in self._samples})
        self.wins = (
            "is more like the voice than" if self.by_voice
            else "makes fewer word errors than" if self.words_count
            else "runs on or says nothing less often than"
        )  # fmt: skip
        self.loses = (
            "makes more word errors than the base" if self.words_count
            else "runs on or says nothing more often than the base"
        )  # fmt: skip

    def better(self, a: Row, b: Row, among: int = 1) -> bool:
        """Whether `a` beats `b` on similarity (else on error rate), beyond the interval; it is one
        of `among` that were tried."""
        alpha = 0.05 / among
        if self.by_voice:
            return self._interval(a, b, lambda spoken: spoken.similarity, alpha)[0] > 0
        return self._interval(a, b, _failure, alpha, weighted=self.words_count)[1] < 0

    def all_better(self, rows: Sequence[Row], base: Row) -> list[Row]:
        """Those that beat the base, at 95% all together, by Holm's rule: a gain that is sure among
        all that were tried leaves fewer that may have come by chance."""
        found: list[Row] = []
        while more := [
            row
            for row in rows
            if row not in found and self.better(row, base, among=len(rows) - len(found))
        ]:
            found += more
        return [row for row in rows if row in found]

    def worse_words(self, a: Row, b: Row) -> bool:
        """Whether `a` makes more errors than `b`, beyond the interval."""
        return self._interval(a, b, _failure, weighted=self.words_count)[0] > 0

    def show(self, a: Row, b: Row, name: str | None = None) -> str:
        """The figures of both; without a name, of what decides."""
        name = name or ("similarity" if self.by_voice else "wer")
        form = "{:.2f}" if name == "similarity" else "{:.0%}"
        if self._samples[0].referenced:
            name += "_referenced"
        figures = [row.figure(name) for row in (a, b)]
        if None in figures:
            return "beyond the interval"
        return " against ".join(form.format(figure.mean) for figure in figures)

    def _interval(
        self,
        a: Row,
        b: Row,
        value: Callable[[Spoken], float | None],
        alpha: float = 0.05,
        weighted: bool = False,
    ) -> tuple[float, float]:
        """Of `a` less `b`, over the samples where both have the value."""
        found = []
        for sample in self._samples:
            pair = [value(sample.spoken[row.name]) for row in (a, b) if row.name in sample.spoken]
            if len(pair) == 2 and None not in pair:
                weight = len(normal_words(sample.text).split()) if weighted else 1
                found.append((pair[0] * weight, pair[1] * weight, weight, sample.text))
        columns = zip(*found, strict=True) if found else ([], [])
        return difference(*columns, alpha=alpha)


def _failure(spoken: Spoken) -> float:
    """The word error rate, or where nobody listened, whether the speech failed altogether."""
    return spoken.wer if spoken.wer is not None else float(spoken.runaway or spoken.empty)
