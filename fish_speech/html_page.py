"""What pages that are read from disk have in common: their head, colours, players, escaping."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from tempfile import TemporaryDirectory

from fish_speech.audio import load_audio, save_audio
from fish_speech.audio_decoding import audio_info

# Blue and vermillion are told apart by colour-blind people too (Okabe and Ito, 2008).
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2733; --muted: #566573; --line: #d8e0e6;
  --raised: #f4f7f9; --blue: #0072b2; --vermillion: #c04a00; --warn: #8a3a10; --warn-back: #fbe3d6 }
@media (prefers-color-scheme: dark) { :root { --paper: #14191e; --ink: #dde5ea; --muted: #9aa9b5;
  --line: #303a42; --raised: #1c232a; --blue: #6db1d9; --vermillion: #f09a5b; --warn: #fbd7c2;
  --warn-back: #5a2d17 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.flag { background: var(--warn-back); color: var(--warn); border-radius: .6rem; font-size: .8rem;
  padding: .05rem .6rem }
"""
# Rates that every player of MP3 knows; what has another is resampled to the highest.
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page around `body` (HTML), in which `script` runs and nothing else.

    The page may show and play what is inside it and what lies beside it, and fetch nothing: what a
    text or a name smuggles in can't run, nor call home.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; media-src data: file: 'self'; base-uri 'none'; form-action 'none'"
    )
    running = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n{running}</body></html>\n"
    )


def escape(value: object) -> str:
    """`value` as text or an attribute's value; bytes of names that are no text become marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def player(source: str, name: str = "") -> str:
    """A player of an address, which is loaded when it is asked for."""
    label = f" aria-label='{escape(name)}'" if name else ""
    return f"<audio controls preload='none'{label} src='{escape(source)}'></audio>"


def data_uri(data: bytes, kind: str) -> str:
    """`data` of a media type, as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def audio_uri(file: str | Path) -> str:
    """A recording as an address that holds it, as MP3, which every browser plays.

    Raises as `fish_speech.audio.load_audio`.
    """
    rate = audio_info(file).sample_rate
    waveform, rate = load_audio(file, rate if rate in _MP3_RATES else 44_100)
    with TemporaryDirectory() as folder:
        save_audio(compressed := Path(folder, "audio.mp3"), waveform, rate)
        return data_uri(compressed.read_bytes(), "audio/mpeg")
