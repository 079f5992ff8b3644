"""Which row to use, and why: by significance of paired differences over the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote

from fish_speech.evaluation.intervals import difference
from fish_speech.evaluation.leaderboard import (
    MIN_SAMPLES,
    EvalSample,
    ModelRow,
    Recommendation,
    SampleResult,
    label,
)
from fish_speech.preparation.error_rates import normal_words

_SIGNIFICANT = "significant at 95%"
_NOTICEABLE = 0.01  # of similarity; adapters that do next to nothing move it by less, surely
_SHOWN = {"similarity": ("similarity", "{:.2f}"), "wer": ("word error rate", "{:.0%}")}


@dataclass(frozen=True)
class Commands:
    """The command to give next for each verdict: `use` (with `{path}` for the chosen row's),
    `train_longer`, `keep`, and `fewer_word_errors` where another training would make fewer."""

    use: str
    train_longer: str
    keep: str
    fewer_word_errors: str | None = None


def literal(words: str) -> str:
    """Words for `Commands.use`, their braces escaped."""
    return words.replace("{", "{{").replace("}", "}}")


def recommend(
    rows: Sequence[ModelRow], samples: Sequence[EvalSample], commands: Commands
) -> Recommendation:
    """The earliest row that no later one significantly beats on similarity, among those that
    significantly beat the base and whose word error rate is not significantly worse.

    Significant: the 95% interval of the difference, over the samples that both spoke, leaves out
    zero. For the gains over the base all intervals hold at 95% together, for one of many rows that
    are no better would seem so by chance. A row that is not more like the voice than the base is
    not worth using: then "train longer" where the held-out loss still falls, else "keep the base".
    Without similarities word error rates decide; without a recogniser, runaways and empty outputs
    take their place.
    """
    compare = _Comparison(samples)
    base, *others = rows
    measured = [row for row in others if row.error is None]
    if base.error or not measured:
        what = "the base could not" if base.error else "no checkpoint could"
        return _keep(base, f"{what} be measured", commands)
    acceptable = [row for row in measured if not compare.more_errors(row, base)]
    if not acceptable:
        reason = f"every checkpoint {compare.more_errors_phrase} than the base"
        if commands.fewer_word_errors:
            reason += "; adapting the fast transformer alone costs fewer words"
        command = commands.fewer_word_errors or commands.keep
        return Recommendation(base.name, base.step, "keep the base", reason, command)
    if compare.count < MIN_SAMPLES:
        return _keep(base, f"too few different texts to tell: {compare.count}", commands)
    better = compare.all_better(measured, base)
    gains = [row for row in acceptable if row in better]
    if gains:
        best = next(
            row
            for index, row in enumerate(gains)
            if not any(compare.better(later, row) for later in gains[index + 1 :])
        )
        return _use(best, base, acceptable, measured, compare, commands)
    last = acceptable[-1]
    falling = last is measured[-1] and _loss_falls([base, *measured])
    gain = f"no checkpoint {compare.better_phrase} than the base"
    costly = [label(row.name) for row in better if row not in acceptable]
    if costly:
        gain += f" (except {', '.join(costly)}: each {compare.more_errors_phrase})"
    if falling:
        reason = f"{gain} yet, and the held-out loss still falls"
        return Recommendation(None, None, "train longer", reason, commands.train_longer)
    return _keep(base, gain, commands)


def prefer(
    a: ModelRow, b: ModelRow, samples: Sequence[EvalSample], commands: Commands
) -> Recommendation:
    """Which of two models to use, by the same rules; `a` where neither is better."""
    compare = _Comparison(samples)
    for one, other in ((b, a), (a, b)):
        if one.error is not None:
            continue
        if other.error is not None:
            reason = f"{other.name} could not be measured"
        elif compare.better(one, other) and not compare.more_errors(one, other):
            reason = compare.gain(one, other, other.name)
        elif (
            compare.by_similarity
            and compare.more_errors(other, one)
            and not compare.better(other, one)
        ):
            shown = compare.show(one, other, "wer")
            reason = f"fewer word errors than {other.name} ({_listed(shown, _SIGNIFICANT)})"
        else:
            continue
        path = quote(str(one.path))
        return Recommendation(one.name, one.step, "use", reason, commands.use.format(path=path))
    if a.error is not None:
        reason = "neither could be measured"
    elif compare.count < MIN_SAMPLES:
        reason = f"too few different texts to tell: {compare.count}"
    elif gained := [row.name for row in (a, b) if compare.better(row, b if row is a else a)]:
        reason = f"{gained[0]} {compare.better_phrase}, but {compare.more_errors_phrase}"
    else:
        reason = "neither is significantly better than the other"
    return _keep(a, reason, commands)


def _use(
    best: ModelRow, base: ModelRow, acceptable: list[ModelRow], measured: list[ModelRow],
    compare: _Comparison, commands: Commands,
) -> Recommendation:  # fmt: skip
    reason = compare.gain(best, base, "the base")
    if compare.by_similarity and compare.by_words:
        shown = compare.show(best, base, "wer") or "word errors"
        reason += f"; {shown}, not significantly worse"
    if best is not acceptable[-1]:
        reason += "; no later one is significantly better"
    elif best is not measured[-1]:
        reason += f"; each later one {compare.more_errors_phrase} than the base"
    elif len(acceptable) > 1 and compare.better(best, acceptable[-2]):
        reason += "; it is the last and still getting better: a higher --max-steps may help"
    if len(measured) == 1:
        reason += "; it is the only checkpoint: a lower --save-every gives more to choose from"
    next_command = commands.use.format(path=quote(str(best.path)))
    return Recommendation(best.name, best.step, "use", reason, next_command)


def _keep(base: ModelRow, reason: str, commands: Commands) -> Recommendation:
    return Recommendation(base.name, base.step, "keep the base", reason, commands.keep)


def _loss_falls(rows: list[ModelRow]) -> bool:
    """Whether the last row's held-out loss is the lowest of all."""
    losses = [loss.mean for row in rows if (loss := row.estimate("held_out_loss"))]
    return len(losses) > 1 and losses[-1] < min(losses[:-1])


def _listed(*words: str) -> str:
    """Those that are not empty, with commas."""
    return ", ".join(filter(None, words))


class _Comparison:
    """Rows against each other, sample by sample: over the samples without a reference, if any."""

    def __init__(self, samples: Sequence[EvalSample]) -> None:
        self._samples = [sample for sample in samples if not sample.referenced] or list(samples)
        results = [result for sample in self._samples for result in sample.spoken.values()]
        self.by_similarity = any(result.similarity is not None for result in results)
        self.by_words = any(result.wer is not None for result in results)
        self.count = len({sample.text for sample in self._samples})
        self._gain, self.better_phrase = (
            ("more like the voice", "is significantly more like the voice") if self.by_similarity
            else ("fewer word errors", "makes significantly fewer word errors") if self.by_words
            else ("fewer runaways and empty outputs",
                  "has significantly fewer runaways and empty outputs")
        )  # fmt: skip
        self.more_errors_phrase = (
            "makes significantly more word errors" if self.by_words
            else "has significantly more runaways and empty outputs"
        )  # fmt: skip

    def better(self, a: ModelRow, b: ModelRow, among: int = 1) -> bool:
        """Whether `a` significantly beats `b` on similarity (else on errors), where it is one of
        `among` rows that are tried."""
        alpha = 0.05 / among
        if self.by_similarity:
            low, high = self._interval(a, b, lambda result: result.similarity, alpha)
            return low > 0 and (low + high) / 2 > _NOTICEABLE
        return self._interval(a, b, _errors, alpha, weighted=self.by_words)[1] < 0

    def all_better(self, rows: Sequence[ModelRow], base: ModelRow) -> list[ModelRow]:
        """Those that beat the base, at 95% all together, by Holm's step-down method: each row that
        is found leaves fewer to correct for."""
        found: list[ModelRow] = []
        while more := [
            row
            for row in rows
            if row not in found and self.better(row, base, among=len(rows) - len(found))
        ]:
            found += more
        return [row for row in rows if row in found]

    def more_errors(self, a: ModelRow, b: ModelRow) -> bool:
        """Whether `a` makes significantly more errors than `b`."""
        return self._interval(a, b, _errors, weighted=self.by_words)[0] > 0

    def gain(self, a: ModelRow, b: ModelRow, name: str) -> str:
        """What `a` has over `b`, which is called `name`."""
        shown = self.show(a, b, "similarity" if self.by_similarity else "wer")
        return f"{self._gain} than {name} ({_listed(shown, _SIGNIFICANT)})"

    def show(self, a: ModelRow, b: ModelRow, metric: str) -> str:
        """The means of both in a metric; nothing where one has none."""
        title, form = _SHOWN[metric]
        if self._samples[0].referenced:
            metric += "_referenced"
        both = [row.estimate(metric) for row in (a, b)]
        if None in both:
            return ""
        return f"{title} {' against '.join(form.format(each.mean) for each in both)}"

    def _interval(
        self,
        a: ModelRow,
        b: ModelRow,
        value: Callable[[SampleResult], float | None],
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


def _errors(result: SampleResult) -> float:
    """The word error rate; without a recogniser, 1 where the speech failed altogether."""
    return result.wer if result.wer is not None else float(result.runaway or result.empty)
