"""The leaderboard as people read it: `leaderboard.html`, with audio, and `leaderboard.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from fish_speech.audio_decoding import audio_info
from fish_speech.console import counted
from fish_speech.evaluation.charts import charts
from fish_speech.evaluation.leaderboard import (
    Estimate,
    EvalSample,
    Leaderboard,
    ModelRow,
    SampleResult,
    label,
)
from fish_speech.evaluation.metric_columns import (
    COLUMNS,
    Column,
    footnotes,
    is_chosen,
    markdown,
    measured_anchors,
    measured_columns,
    reason,
    verdict,
)
from fish_speech.evaluation.thumbnail import spectrogram_png
from fish_speech.files import write_text
from fish_speech.html_page import audio_uri, data_uri, document, escape, player
from fish_speech.preparation.error_rates import normal_words

HTML_NAME, MARKDOWN_NAME = "leaderboard.html", "leaderboard.md"
MAX_AUDIO_BYTES = 30 * 2**20  # embedded in a page; phones have to hold it too
_RECORDING = "recording"
_SHOWN = {column.name: column for column in COLUMNS}


def write_markdown(board: Leaderboard, folder: str | Path) -> Path:
    """Write the recommendation and the table as `leaderboard.md`."""
    write_text(path := Path(folder) / MARKDOWN_NAME, markdown(board))
    return path


def write_page(
    board: Leaderboard, folder: str | Path, max_audio_bytes: int = MAX_AUDIO_BYTES
) -> Path:
    """Write `leaderboard.html` into the folder that the audio of `board` lies in.

    The page holds all that it shows and plays. Where its audio would take more than
    `max_audio_bytes`, the recordings, the base and the recommended model come first, and the rest
    is linked to.
    """
    folder, beside = Path(folder), Path(__file__).with_name
    grid = _PlayerGrid(board, folder, max_audio_bytes)
    title = f"{board.title}: {verdict(board.recommendation)}"
    body = [
        "<main>",
        _advice(board),
        "<section aria-labelledby='figures'><h2 id='figures'>Figures</h2>",
        "<p class='hint'>The range below a figure is its 95% confidence interval. "
        "A click on a heading sorts.</p>",
        _table(board),
        "</section>",
        _charts(board),
        _listen(board, grid),
        f"<footer><p>{escape(' '.join(footnotes(board)))}</p></footer>",
        "</main>",
    ]
    style, script = (beside(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    path = folder / HTML_NAME
    write_text(path, document(title, "\n".join(body), style=style, script=script))
    return path


def _advice(board: Leaderboard) -> str:
    advice = board.recommendation
    then = f"<p class='next'>Next: <code>{escape(advice.next)}</code></p>" if advice.next else ""
    return (
        f"<header><p class='kicker'>{escape(board.title)}</p><h1>{escape(verdict(advice))}</h1>"
        f"<p>{escape(reason(board))}</p>{then}</header>"
    )


def _table(board: Leaderboard) -> str:
    columns = measured_columns(board)
    heads = "".join(
        f"<th scope='col' aria-sort='none' data-first='{_first_order(column)}'>"
        f"<button type='button' title='{escape(column.meaning)}'>{column.title}"
        f"<small>{column.unit or '&nbsp;'}</small></button></th>"
        for column in columns
    )
    rows = [_row(board, row, columns, index) for index, row in enumerate(board.rows)]
    anchors = [
        _row(board, row, columns, index) for index, row in enumerate(measured_anchors(board))
    ]
    return (
        "<div class='scroll' role='region' aria-labelledby='figures' tabindex='0'>"
        "<table class='figures sortable'><thead><tr>"
        "<th scope='col' aria-sort='ascending' data-first='ascending'><button type='button'>"
        f"Model<small>&nbsp;</small></button></th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody><tbody class='anchors'>{''.join(anchors)}</tbody>"
        "</table></div>"
    )


def _first_order(column: Column) -> str:
    """How a column is sorted at first: the best on top."""
    return "ascending" if column.best == "low" else "descending"


def _row(board: Leaderboard, row: ModelRow, columns: Sequence[Column], index: int) -> str:
    chosen = is_chosen(board, row.name)
    mark = " <span class='chosen-mark'>★ recommended</span>" if chosen else ""
    head = (
        f"<tr{' class=chosen' if chosen else ''}><th scope='row' data-value='{index}' "
        f"title='{escape(row.path or '')}'>{escape(label(row.name))}{mark}</th>"
    )
    if row.error is not None:
        said = f"could not be measured: {escape(row.error)}"
        return f"{head}<td class='error' colspan='{len(columns)}'>{said}</td></tr>"
    return head + "".join(_estimate_cell(board, column, row) for column in columns) + "</tr>"


def _estimate_cell(board: Leaderboard, column: Column, row: ModelRow) -> str:
    found = row.estimate(column.name)
    if found is None:
        return "<td>–</td>"
    everywhere = [f for r in [*board.rows, *board.scale] if (f := r.estimate(column.name))]
    return (
        f"<td data-value='{found.mean:g}' title='of {found.n}'><b>{column.show(found.mean)}</b>"
        f"<small>{column.interval(found)}</small>{_whisker(found, everywhere)}</td>"
    )


def _whisker(estimate: Estimate, everywhere: Sequence[Estimate]) -> str:
    """Where an estimate and its interval lie among those of its column."""
    low, high = min(f.low for f in everywhere), max(f.high for f in everywhere)
    at = [
        4 + 72 * (v - low) / (high - low or 1) for v in (estimate.low, estimate.mean, estimate.high)
    ]
    return (
        "<svg class='whisker' viewBox='0 0 80 8' aria-hidden='true'><path d='M0 4H80'/>"
        f"<path class='reach' d='M{at[0]:.1f} 4H{at[2]:.1f}'/>"
        f"<circle cx='{at[1]:.1f}' cy='4' r='3'/></svg>"
    )


def _charts(board: Leaderboard) -> str:
    drawn = charts(board)
    if not drawn:
        return ""
    return (
        "<section><h2>Charts</h2><p class='hint'>Bands and bars are 95% confidence intervals, "
        f"dashed lines real recordings.</p><div class='charts'>{''.join(drawn)}</div></section>"
    )


def _listen(board: Leaderboard, grid: _PlayerGrid) -> str:
    if not board.samples:
        return ""
    columns = [_RECORDING] if any(sample.recording for sample in board.samples) else []
    columns += [row.name for row in board.rows if row.error is None]
    heads = "".join(
        f"<th scope='col'>{escape(label(name))}{' ★' if is_chosen(board, name) else ''}</th>"
        for name in columns
    )
    rows = "".join(grid.row(sample, columns) for sample in board.samples)
    kinds = {sample.referenced for sample in board.samples}
    note = (
        f"<p class='hint'>Links to the files beside this page, which else would be too large: "
        f"{counted(len(grid.left_out), 'sample')}.</p>"
        if grid.left_out else ""
    )  # fmt: skip
    return (
        "<section aria-labelledby='listen'><h2 id='listen'>Listen</h2>"
        "<p class='hint'>Below each sample: word errors and similarity; open it for what was "
        "heard. Arrow keys go from player to player, space plays, escape stops.</p>"
        f"{note}<div class='choices'>{_KINDS if len(kinds) > 1 else ''}"
        "<button type='button' id='all-heard' aria-pressed='false'>Show what was heard</button>"
        "</div><div class='scroll' role='region' aria-labelledby='listen' tabindex='0'>"
        f"<table class='samples'><thead><tr><th scope='col'>Text</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


_KINDS = (
    "<fieldset><legend>Show</legend>"
    "<label><input type='radio' name='kind' id='all' checked> all</label>"
    "<label><input type='radio' name='kind' id='plain'> from text alone</label>"
    "<label><input type='radio' name='kind' id='cloned'> cloning</label></fieldset>"
)


class _PlayerGrid:
    """The grid of players; each file is embedded once, as far as there is room."""

    def __init__(self, board: Leaderboard, folder: Path, most: int) -> None:
        self._board, self._folder = board, folder
        self._uris: dict[Path, str] = {}  # data by file
        self._ids: dict[Path, str] = {}  # of the audio elements that are in the page already
        self.left_out: set[Path] = set()
        for file in dict.fromkeys(self._by_importance()):
            try:
                if self.left_out:  # converting the others takes long, and only short ones had room
                    audio_info(file)
                    self.left_out.add(file)
                    continue
                address = audio_uri(file)
            except (ValueError, OSError):
                continue  # its cell says so
            if len(address) <= most:
                most -= len(address)
                self._uris[file] = address
            else:
                self.left_out.add(file)

    def _by_importance(self) -> Iterator[Path]:
        board = self._board
        names = [row.name for row in board.rows]
        chosen = [name for name in names if is_chosen(board, name)]
        for name in dict.fromkeys([_RECORDING, *names[:1], *chosen, *reversed(names)]):
            for sample in board.samples:
                if (file := self._file(sample, name)) is not None:
                    yield file

    def _file(self, sample: EvalSample, name: str) -> Path | None:
        if name == _RECORDING:
            return Path(sample.recording) if sample.recording else None
        spoken = sample.spoken.get(name)
        return self._folder / spoken.audio if spoken and spoken.audio else None

    def row(self, sample: EvalSample, columns: Sequence[str]) -> str:
        seconds = {name: self._seconds(sample, name) for name in columns}
        longest = max(seconds.values(), default=0.0) or 1.0
        cells = "".join(self._cell(sample, name, seconds[name] / longest) for name in columns)
        kind = "cloned" if sample.referenced else "plain"
        how = "<span class='kind'>cloning a reference clip</span>" if sample.referenced else ""
        head = f"<th scope='row' dir='auto'>{escape(sample.text)}{how}</th>"
        return f"<tr class='{kind}'>{head}{cells}</tr>"

    def _seconds(self, sample: EvalSample, name: str) -> float:
        if (file := self._file(sample, name)) is None:
            return 0.0
        try:
            return audio_info(file).duration or 0.0
        except (ValueError, OSError):
            return 0.0

    def _cell(self, sample: EvalSample, name: str, share: float) -> str:
        file, spoken = self._file(sample, name), sample.spoken.get(name)
        shown = self._player(file, f"{label(name)}: {sample.text}", share) if file else ""
        if not shown and not (spoken and spoken.empty):
            shown = "<p class='none'>–</p>" if file is None else "<p class='none'>can't be read</p>"
        heard = _heard(sample.text, spoken) if spoken else ""
        return f"<td data-model='{escape(label(name))}'>{shown}{heard}</td>"

    def _player(self, file: Path, name: str, share: float) -> str:
        """As long as its sound is within the row, so that one sees who runs on."""
        if (address := self._uris.get(file)) is None:
            if file not in self.left_out:
                return ""
            near = file.relative_to(self._folder) if file.is_relative_to(self._folder) else None
            if near is None:
                return f"<p class='none'>{escape(file)}</p>"
            return f"<a href='{quote(near.as_posix())}'>{escape(near)}</a>"
        element = ""
        if file not in self._ids:
            self._ids[file] = f"sound{len(self._ids)}"
            element = player(address, name)
        element_id = self._ids[file]
        picture = data_uri(spectrogram_png(file), "image/png")
        return (
            f"<button type='button' class='play' data-sound='{element_id}' aria-pressed='false' "
            f"aria-label='Play {escape(name)}'><span class='track' style='--share:{share:.3f}'>"
            f"<img src='{picture}' alt=''></span></button>"
            + element.replace("<audio", f"<audio id='{element_id}'")
        )


def _heard(wanted: str, spoken: SampleResult) -> str:
    """Word errors and similarity, what went wrong, and what was heard."""
    flags = ["runs on"] * spoken.runaway + ["says nothing"] * spoken.empty
    said = "".join(f" <span class='flag'>{flag}</span>" for flag in flags)
    figures = " · ".join(
        _SHOWN[name].show(value)
        for name in ("wer", "similarity")
        if (value := getattr(spoken, name)) is not None
    )
    if spoken.heard is None:
        return f"<p class='heard'>{figures}{said}</p>"
    return (
        f"<details class='heard'><summary title='heard: {escape(spoken.heard)}'>{figures}{said}"
        f"</summary><p dir='auto'>{_word_diff(wanted, spoken.heard)}</p></details>"
    )


def _word_diff(wanted: str, heard: str) -> str:
    """`heard` as HTML, with missed words struck out and wrong ones marked."""
    wanted, heard = normal_words(wanted), normal_words(heard)
    if not wanted or not heard:
        return escape(heard) or "nothing"
    import jiwer

    said, found, parts = wanted.split(), heard.split(), []
    for piece in jiwer.process_words(wanted, heard).alignments[0]:
        missed = " ".join(said[piece.ref_start_idx : piece.ref_end_idx])
        instead = " ".join(found[piece.hyp_start_idx : piece.hyp_end_idx])
        if piece.type == "equal":
            parts.append(escape(instead))
        else:
            parts += [f"<del>{escape(missed)}</del>"] * bool(missed)
            parts += [f"<ins>{escape(instead)}</ins>"] * bool(instead)
    return " ".join(parts)
