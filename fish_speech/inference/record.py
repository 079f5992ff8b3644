"""Record speech: to a file and to the loudspeaker, piece by piece, with its statistics."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fish_speech.audio import audio_writer
from fish_speech.console import Say
from fish_speech.files import atomic_path
from fish_speech.inference.jobs import SpeechJob, check_output
from fish_speech.inference.playback import NoPlayback, Player
from fish_speech.inference.speech import Piece
from fish_speech.inference.streaming import SilenceTrimmer


@dataclass(frozen=True)
class Recorded:
    """Whether all of a speech was `played`, and whether it is `complete`: no chunk was lost."""

    played: bool
    complete: bool


def record_job(
    job: SpeechJob,
    pieces: Callable[[bool], Iterator[Piece]],
    sample_rate: int,
    *,
    play: bool = False,
    trim_silence: bool = False,
    say: Say,
) -> Recorded:
    """Record a job to its file, whose path is printed, or to standard output where it has none.

    A `playback_only` job is written to its file only where it can't be played. Raises as `record`
    does, and `ValueError` where that file can't be written.
    """

    def checked_pieces(played: bool) -> Iterator[Piece]:
        if job.playback_only and not played:
            check_output(job.output)
        return pieces(played)

    with tempfile.TemporaryDirectory() as folder:
        is_temporary = job.output is None or job.playback_only
        file = Path(folder, "speech.wav") if is_temporary else job.output
        options = {"play": play, "trim_silence": trim_silence, "say": say}
        recorded = record(checked_pieces, file, sample_rate, **options)
        if job.output is None:
            sys.stdout.buffer.write(file.read_bytes())
            sys.stdout.buffer.flush()
        elif not (job.playback_only and recorded.played):
            if is_temporary:
                with atomic_path(job.output) as temporary:
                    shutil.copyfile(file, temporary)
            print(job.output, flush=True)
    return recorded


def record(
    pieces: Callable[[bool], Iterator[Piece]],
    file: Path,
    sample_rate: int,
    *,
    play: bool = False,
    trim_silence: bool = False,
    say: Say,
) -> Recorded:
    """Write pieces to `file`, and play them, as they come; `say` is told what the user should know.

    `pieces` is called with whether they are played. Raises as `TextToSpeech.pieces` and
    `audio_writer` do, and `ValueError` for nothing but silence.
    """
    trimmed = SilenceTrimmer(sample_rate) if trim_silence else lambda waveform: waveform
    started, first_audio_after, samples, frames = time.perf_counter(), 0.0, 0, 0
    complete, player_failed = True, False
    with ExitStack() as stack:
        # The file is closed first: it is whole while the rest of it is still being played.
        player = _open_player(stack, sample_rate, say) if play else None
        write = stack.enter_context(audio_writer(file, sample_rate))
        bar = stack.enter_context(tqdm(unit="chunk", leave=False, disable=None))
        for piece in pieces(player is not None):
            waveform = trimmed(piece.waveform)
            if waveform.shape[1]:
                first_audio_after = first_audio_after or time.perf_counter() - started
                write(waveform)
                if player is not None and not player_failed:
                    player.write(waveform)
                    player_failed = _report_failure(player)
            samples, frames = samples + waveform.shape[1], frames + piece.frames
            complete = complete and not piece.lost
            if piece.problem:
                tqdm.write(f"Warning: {piece.problem}", file=sys.stderr)
            bar.total = piece.count
            bar.update(piece.ends_chunk)
        if not samples:
            raise ValueError("the speech is nothing but silence; try another --seed")
        took, duration = time.perf_counter() - started, samples / sample_rate
        say(
            f"{duration:.1f} s of speech in {took:.1f} s: real-time factor {took / duration:.2f},"
            f" {frames / took:.0f} frames/s, first audio after {first_audio_after:.2f} s"
        )
    if player is not None and not player_failed:
        player_failed = _report_failure(player)
    return Recorded(played=player is not None and not player_failed, complete=complete)


def _report_failure(player: Player) -> bool:
    """Print the player's failure, if any; return whether there is one."""
    if player.failure:
        tqdm.write(f"Playing failed: {player.failure}", file=sys.stderr)
    return player.failure is not None


def _open_player(stack: ExitStack, sample_rate: int, say: Say) -> Player | None:
    try:
        return stack.enter_context(Player(sample_rate))
    except NoPlayback as error:
        say(f"Nothing can be played here: {error}")
        return None
