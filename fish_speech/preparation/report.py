"""`report.html`: a dataset on one page, to look at and listen to; the flagged clips come first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fish_speech.audio import decode_blocks
from fish_speech.files import write_text
from fish_speech.html_page import document, escape, player
from fish_speech.preparation.entries import ClipEntry, time_span
from fish_speech.preparation.summary import Summary

REPORT_NAME = "report.html"
_POINTS = 120  # of a waveform's thumbnail
_FIGURES = (
    ("duration", "s", "how long it is"),
    ("loudness", "LUFS", "how loud"),
    ("snr", "dB", "speech above the noise"),
    ("characters_per_second", "/s", "letters a second of speech"),
    ("disagreement", "", "with the recogniser"),
)
_STYLE = """
.totals { display: flex; flex-wrap: wrap; gap: 2rem; padding: 0; list-style: none }
.totals b { display: block; font-size: 1.6rem }
.plots { display: flex; flex-wrap: wrap; gap: 3rem }
svg { fill: var(--blue) } svg text { fill: var(--muted); font-size: 11px }
article { display: grid; grid-template-columns: 15rem 1fr; gap: .3rem 1.5rem; padding: .8rem 0;
  border-top: 1px solid var(--line) }
article p { margin: 0 } .name { grid-column: 1 / -1; overflow-wrap: anywhere }
.figures { color: var(--muted); font-size: .85rem }
.flag { margin-left: .5rem }
audio { width: 15rem; height: 2rem }
"""


def write_report(summary: Summary, folder: Path) -> Path:
    """Write the page into the dataset at `folder`; it refers to nothing but the clips there."""
    title = f"Dataset {folder.resolve().name}"
    flagged = sum(bool(clip["flags"]) for clip in summary.clips)
    totals = [
        (len(summary.clips), "clips"),
        (summary.minutes, "minutes"),
        (", ".join(summary.speakers) or "none", "speakers"),
        (flagged, "flagged"),
        (len(summary.skipped), "skipped"),
        (len(summary.rejected), "rejected"),
    ]
    ordered = sorted(summary.clips, key=lambda clip: (-len(clip["flags"]), clip["file"]))
    lost = [(entry["source"], entry) for entry in summary.skipped]
    lost += [(entry["file"], entry) for entry in summary.rejected]
    page = [
        f"<h1>{escape(title)}</h1><ul class='totals'>",
        *(f"<li><b>{escape(value)}</b>{name}</li>" for value, name in totals),
        "</ul><div class='plots'>",
        _plot("Durations", "seconds", [clip["duration"] for clip in summary.clips]),
        _plot("Loudness", "LUFS", [clip["loudness"] for clip in summary.clips]),
        "</div>",
        "<h2>Skipped and rejected</h2><ul>" if lost else "",
        *(
            f"<li>{escape(name)}{time_span(entry)}: {escape(entry['reason'])}</li>"
            for name, entry in lost
        ),
        "</ul>" if lost else "",
        "<h2>Clips</h2>",
        *(_article(clip, folder) for clip in ordered),
    ]
    path = folder / REPORT_NAME
    write_text(path, document(title, "\n".join(page), style=_STYLE))
    return path


def _article(clip: ClipEntry, folder: Path) -> str:
    path = folder / clip["file"]
    flags = "".join(f"<span class='flag'>{escape(flag)}</span>" for flag in clip["flags"])
    figures = " · ".join(
        f"<span title='{meaning}'>{clip[name]:g} {unit}</span>".replace(" </", "</")
        for name, unit, meaning in _FIGURES
        if name in clip
    )
    heard = clip.get("heard")
    heard = "" if heard is None else f"<p class='figures'>heard: {escape(heard or 'nothing')}</p>"
    source = f"{escape(clip['source'])}{time_span(clip)}"
    return (
        f"<article><p class='name'>{escape(clip['file'])}{flags}</p>"
        f"<div>{_thumbnail(path)}{player(quote(clip['file']))}</div>"
        f"<div><p>{escape(clip['text'])}</p>{heard}"
        f"<p class='figures'>{figures} · {source}</p></div></article>"
    )


def _thumbnail(path: Path) -> str:
    """The waveform as a filled outline, from the peaks of equal stretches."""
    try:
        samples = np.concatenate(list(decode_blocks(path)))
    except (ValueError, OSError):
        return "<p>can't be read</p>"
    peaks = [float(np.abs(part).max(initial=0.0)) for part in np.array_split(samples, _POINTS)]
    top = " ".join(f"{x * 2},{20 - 19 * min(1, peak):.1f}" for x, peak in enumerate(peaks))
    down = " ".join(
        f"{x * 2},{20 + 19 * min(1, peak):.1f}" for x, peak in reversed(list(enumerate(peaks)))
    )
    return (
        f"<svg width='240' height='40' role='img' aria-label='waveform'>"
        f"<polygon points='{top} {down}'/></svg>"
    )


def _plot(title: str, unit: str, values: Sequence[float]) -> str:
    """A histogram of `values`."""
    if not values:
        return ""
    low, high = float(np.floor(min(values))), float(np.floor(max(values))) + 1
    counts, edges = np.histogram(values, bins=min(24, max(4, int(high - low))), range=(low, high))
    width = 360 / len(counts)
    bars = "".join(
        f"<rect x='{index * width:.1f}' y='{110 - 100 * count / counts.max():.1f}' "
        f"width='{width - 1:.1f}' height='{100 * count / counts.max():.1f}'>"
        f"<title>{edges[index]:.1f} to {edges[index + 1]:.1f} {unit}: {count}</title></rect>"
        for index, count in enumerate(counts)
    )
    return (
        f"<section><h2>{title}</h2><svg width='360' height='130' role='img' "
        f"aria-label='{title}'>{bars}<text y='126'>{low:g}</text>"
        f"<text x='360' y='126' text-anchor='end'>{high:g} {unit}</text></svg></section>"
    )
