"""Speech on its way: to a file and to the loudspeaker, piece by piece, with what it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fish_speech.audio import audio_writer
from fish_speech.inference.playback import NoPlayback, Player
from fish_speech.inference.speech import Piece
from fish_speech.inference.streaming import SilenceTrimmer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recorded:
    """Whether all of a speech was `heard`, and whether it is `whole`: no chunk of it was lost."""

    heard: bool
    whole: bool


def record(
    pieces: Callable[[bool], Iterator[Piece]],
    file: Path,
    sample_rate: int,
    *,
    play: bool = False,
    trim_silence: bool = False,
    say: Say,
) -> Recorded:
    """Send pieces to `file` and the player as they come; `say` is told what the user should know.

    `pieces` is called with whether they are played. Raises as `TextToSpeech.pieces` and
    `audio_writer` do, and `ValueError` for mere silence.
    """
    trimmed = SilenceTrimmer(sample_rate) if trim_silence else lambda waveform: waveform
    started, first_after, samples, frames = time.perf_counter(), 0.0, 0, 0
    whole, silent = True, False  # whether all was spoken; whether the player has failed
    with ExitStack() as stack:
        # The file is closed first: it is whole while the rest of it is still being heard.
        player = _open_player(stack, sample_rate, say) if play else None
        write = stack.enter_context(audio_writer(file, sample_rate))
        bar = stack.enter_context(tqdm(unit="chunk", leave=False, disable=None))
        for piece in pieces(player is not None):
            waveform = trimmed(piece.waveform)
            if waveform.shape[1]:
                first_after = first_after or time.perf_counter() - started
                write(waveform)
                if player is not None and not silent:
                    player.write(waveform)
                    silent = _say_failure(player)
            samples, frames = samples + waveform.shape[1], frames + piece.frames
            whole = whole and not piece.lost
            if piece.problem:
                tqdm.write(f"Warning: {piece.problem}", file=sys.stderr)
            bar.total = piece.count
            bar.update(piece.ends_chunk)
        if not samples:
            raise ValueError("the speech is nothing but silence; try another --seed")
        took, duration = time.perf_counter() - started, samples / sample_rate
        say(
            f"{duration:.1f} s of speech in {took:.1f} s: real-time factor {took / duration:.2f},"
            f" {frames / took:.0f} frames/s, first audio after {first_after:.2f} s"
        )
    if player is not None and not silent:
        silent = _say_failure(player)
    return Recorded(heard=player is not None and not silent, whole=whole)


def _say_failure(player: Player) -> bool:
    """Whether the player has failed, which is then said."""
    if player.failure:
        tqdm.write(f"Playing failed: {player.failure}", file=sys.stderr)
    return player.failure is not None


def _open_player(stack: ExitStack, sample_rate: int, say: Say) -> Player | None:
    try:
        return stack.enter_context(Player(sample_rate))
    except NoPlayback as error:
        say(f"Nothing can be played here: {error}")
        return None
