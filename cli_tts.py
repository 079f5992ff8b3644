#!/usr/bin/env python3
"""Text in, speech out: speaks with a trained voice, to a file, to the loudspeaker or both."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fish_speech.audio import SAVE_FORMATS, audio_writer
from fish_speech.devices import PRECISIONS, resolve_device, resolve_precision, set_threads
from fish_speech.files import atomic_path, exclusive, file_digest

if TYPE_CHECKING:
    from fish_speech.conversation import Utterance
    from fish_speech.inference import Piece, Settings, TextToSpeech
    from fish_speech.inference.jobs import Job
    from fish_speech.inference.playback import Player

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SMALL_MODEL = 100_000_000  # bytes of weights
EPILOG = """\
exit status: 0 spoken; 1 some texts failed; 2 bad usage or bad input; 130 interrupted

examples:
  cli_tts.py "Hello there." --play
  cli_tts.py --text-file chapter.txt -o chapter.mp3
  cli_tts.py --text-file lines.txt --batch -o takes/
  cli_tts.py "Hello." --reference-audio me.wav --reference-text "What I say in it."
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", help="what to speak; '-' reads standard input")
    parser.add_argument("--text-file", metavar="FILE", help="read the text from a UTF-8 file")
    parser.add_argument("--batch", action="store_true", help="one audio file for every line")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"audio file ({', '.join(SAVE_FORMATS)}); with --batch a folder; '-' writes WAV to"
        " standard output (default: output/<first words>.wav, nothing with --play)",
    )
    parser.add_argument("--play", action="store_true", help="play the speech while it is made")
    parser.add_argument("--trim-silence", action="store_true", help="cut silence at both ends")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    voice = parser.add_argument_group("voice")
    voice.add_argument(
        "--model-path",
        metavar="DIR",
        help="model directory, or a model version as '1.5' or 'tiny' (default: the newest"
        " checkpoints/*-merged, else the published model, else tiny)",
    )
    voice.add_argument("--list-voices", action="store_true", help="list the models there are")
    voice.add_argument("--speaker", metavar="NAME", help="a voice of a model with several")
    voice.add_argument(
        "--reference-audio",
        metavar="FILE",
        action="append",
        default=[],
        help="a recording whose voice is cloned; repeatable",
    )
    voice.add_argument(
        "--reference-text",
        metavar="TEXT",
        action="append",
        default=[],
        help="what it says, one for each recording (default: the .lab or .txt beside it)",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.7, help="(default: %(default)s)")
    sampling.add_argument("--top-p", type=float, default=0.7, help="(default: %(default)s)")
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.2, help="(default: %(default)s)"
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same speech (default: 0)"
    )
    sampling.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="N takes: seed, seed+1, ..."
    )
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest speech of a chunk in frames (default: what its text can take)",
    )
    sampling.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="further tries for a chunk that runs on or breaks off (default: 2, with --play 0:"
        " what was heard can't be taken back)",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or mps (default: CUDA if any, else CPU)"
    )
    machine.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the language model (default: bf16 on CUDA that has it, else fp32)",
    )
    machine.add_argument(
        "--quantize",
        choices=("int8",),
        help="weights in a byte each: faster on a CPU with a large model, a little less exact",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile the model first, a minute: for long texts on CUDA (no gain on a CPU)",
    )
    machine.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="processor threads (default: one a core, but a single one for a small model)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return list_voices() if args.list_voices else speak(args)
    except KeyboardInterrupt:
        say("\nInterrupted; what was not finished was not written.")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        return complain(error, args.debug, BAD_INPUT)
    except Exception as error:  # out of memory, a driver's failure, a mistake of ours
        return complain(error, args.debug, FAILED)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def complain(error: Exception, debug: bool, status: int) -> int:
    if debug:
        traceback.print_exc()
    say(f"cli_tts.py: {str(error) or type(error).__name__}")
    return status


def setup_fish_speech(model_path: str | None = None) -> tuple[Path, Path]:
    """The repository's folder and the model directory to speak with; says which and why."""
    fish_speech_dir = Path(__file__).resolve().parent
    if model_path is not None:
        from fish_speech.hub import find_model

        path = find_model(model_path, fish_speech_dir)
        say(f"Voice: {_shown(path)} (--model-path)")
        return fish_speech_dir, path

    # A voice of your own can be preferred here: return fish_speech_dir, Path("its directory").

    from fish_speech.inference.voices import local_voices

    path, what = local_voices(fish_speech_dir)[0]
    why = what if path.name.endswith("-merged") else f"{what}; no checkpoints/*-merged is there"
    say(f"Voice: {_shown(path)} ({why})")
    return fish_speech_dir, path


def _shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def list_voices() -> int:
    from fish_speech.inference.voices import local_voices

    for path, what in local_voices(Path(__file__).resolve().parent):
        print(f"{_shown(path)}\t{what}")
    return OK


def speak(args: argparse.Namespace) -> int:
    text = read_text(args)
    jobs = plan_jobs(args, text)
    settings_of(args, args.seed)  # what is out of range is said before anything is loaded
    _, model_dir = setup_fish_speech(args.model_path)
    started = time.perf_counter()
    tts = load(args, model_dir)
    references = read_references(args, tts)
    say(f"Loaded in {time.perf_counter() - started:.1f} s")
    if args.batch and jobs[0].output is not None:
        failed = resume_batch(args, tts, jobs, references, model_dir)
    else:
        failed = sum(not attempt(args, tts, job, references) for job in jobs)
    return FAILED if failed else OK


def plan_jobs(args: argparse.Namespace, text: str) -> list[Job]:
    from fish_speech.inference.jobs import default_output, plan

    if args.output == "-":
        if args.batch or args.num_samples > 1:
            raise ValueError("'-o -' takes one speech: no --batch and no --num-samples")
        output = None
    elif args.output is not None:
        output = Path(args.output)
    else:
        output = None if args.play else default_output(text, args.batch)
    jobs = plan(text, output, batch=args.batch, seed=args.seed, takes=args.num_samples)
    lines = len(text.splitlines())
    if args.batch and len(jobs) < lines * args.num_samples:
        say(f"{lines - len(jobs) // args.num_samples} of {lines} lines have no words: left out")
    return jobs


def resume_batch(
    args: argparse.Namespace,
    tts: TextToSpeech,
    jobs: list[Job],
    references: list[Utterance],
    model_dir: Path,
) -> int:
    """Do the jobs that are not done yet; returns how many failed."""
    from fish_speech.inference.jobs import Ledger

    folder = jobs[0].output.parent
    with exclusive(folder, str(folder)):
        ledger = Ledger(folder, made_of(args, model_dir, references))
        waiting = [job for job in jobs if not ledger.has(job)]
        failed = 0
        for job in waiting:
            if attempt(args, tts, job, references):
                ledger.add(job)
            else:
                failed += 1
    done = len(jobs) - len(waiting)
    say(f"{len(waiting) - failed} spoken, {done} were there already, {failed} failed")
    return failed


def made_of(args: argparse.Namespace, model_dir: Path, said: list[Utterance]) -> list:
    """All that decides how a line sounds, but the line and its seed."""
    weights = (model_dir / "model.pth").stat()
    references = [[file_digest(f) for f in args.reference_audio], [r.text for r in said]]
    sampling = [args.temperature, args.top_p, args.repetition_penalty]
    limits = [args.max_new_tokens, args.retries, args.trim_silence]
    voice = [args.speaker, references, args.precision, args.quantize]
    return [weights.st_size, weights.st_mtime, voice, sampling, limits]


def read_text(args: argparse.Namespace) -> str:
    if (args.text is None) == (args.text_file is None):
        raise ValueError('give either a text (as in: cli_tts.py "Hello.") or --text-file FILE')
    if "-" in (args.text, args.text_file):
        name, content = "standard input", sys.stdin.buffer.read()
    elif args.text_file is not None:
        name, content = args.text_file, Path(args.text_file).read_bytes()
    else:
        return args.text
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason} at {error.start})") from error


def load(args: argparse.Namespace, model_dir: Path) -> TextToSpeech:
    from fish_speech.inference import TextToSpeech

    small = (model_dir / "model.pth").stat().st_size < SMALL_MODEL
    if small or args.threads:  # more threads only wait for each other in a small model
        set_threads(args.threads or 1)
    device = resolve_device(args.device)
    dtype = None if args.precision == "auto" else resolve_precision(args.precision, device)
    if args.compile:
        say("Compiling: the first sentence takes about a minute longer")
    return TextToSpeech.from_pretrained(
        model_dir, device=device, dtype=dtype, quantize=args.quantize, compile=args.compile
    )


def read_references(args: argparse.Namespace, tts: TextToSpeech) -> list[Utterance]:
    from fish_speech.inference.voices import text_beside

    audio, texts = args.reference_audio, args.reference_text
    if texts and len(texts) != len(audio):
        raise ValueError(
            f"{len(audio)} --reference-audio, but {len(texts)} --reference-text: give one for each,"
            " or none where a .lab or .txt file lies beside the recording"
        )
    texts = texts or [text_beside(file) for file in audio]
    return [tts.encode_reference(file, words) for file, words in zip(audio, texts, strict=True)]


def settings_of(args: argparse.Namespace, seed: int) -> Settings:
    from fish_speech.inference import Sampling, Settings

    retries = args.retries if args.retries is not None else 0 if args.play else Settings.retries
    sampling = Sampling(args.temperature, args.top_p, args.repetition_penalty)
    return Settings(sampling, seed, args.max_new_tokens, retries)


def attempt(
    args: argparse.Namespace, tts: TextToSpeech, job: Job, references: list[Utterance]
) -> bool:
    """Speak one job; what is wrong with it is said, not raised, so that the others go on."""
    pieces = tts.pieces(job.text, references, args.speaker, settings_of(args, job.seed))
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = job.output or Path(folder, "speech.wav")
            heard = record(pieces, file, tts.sample_rate, args)
            if args.output == "-":
                sys.stdout.buffer.write(file.read_bytes())
                sys.stdout.buffer.flush()
            elif job.output is not None:
                print(file, flush=True)
            elif not heard:
                print(keep(file, job), flush=True)
    except (ValueError, OSError) as error:
        complain(error, args.debug, FAILED)
        return False
    return True


def keep(file: Path, job: Job) -> Path:
    """Copy what was only to be played to where it would have gone without --play."""
    from fish_speech.inference.jobs import default_output

    output = default_output(job.text, batch=False)
    with atomic_path(output) as temporary:
        shutil.copyfile(file, temporary)
    return output


def record(pieces: Iterator[Piece], file: Path, rate: int, args: argparse.Namespace) -> bool:
    """Send pieces to the file and the player as they come, and say how long it took.

    Returns whether all of it was played.
    """
    from tqdm import tqdm

    from fish_speech.inference.streaming import SilenceTrimmer

    trimmed = SilenceTrimmer(rate) if args.trim_silence else lambda waveform: waveform
    started, first_after, samples, frames = time.perf_counter(), 0.0, 0, 0
    with ExitStack() as stack:
        # The file is closed first: it is whole while the rest of it is still being heard.
        player = open_player(stack, rate) if args.play else None
        write = stack.enter_context(audio_writer(file, rate))
        bar = stack.enter_context(tqdm(unit="chunk", leave=False, disable=None))
        for piece in pieces:
            waveform = trimmed(piece.waveform)
            if waveform.shape[1]:
                first_after = first_after or time.perf_counter() - started
                write(waveform)
                if player is not None:
                    player.write(waveform)
            samples, frames = samples + waveform.shape[1], frames + piece.frames
            if piece.problem:
                tqdm.write(f"Warning: {piece.problem}", file=sys.stderr)
            bar.total = piece.count
            bar.update(piece.ends_chunk)
        if not samples:
            raise ValueError("the speech is nothing but silence; try another --seed")
        took, duration = time.perf_counter() - started, samples / rate
        say(
            f"{duration:.1f} s of speech in {took:.1f} s: real-time factor {took / duration:.2f},"
            f" {frames / took:.0f} frames/s, first audio after {first_after:.2f} s"
        )
    if player is not None and player.failure:
        say(f"Playing failed: {player.failure}")
    return player is not None and not player.failure


def open_player(stack: ExitStack, sample_rate: int) -> Player | None:
    from fish_speech.inference.playback import NoPlayback, Player

    try:
        return stack.enter_context(Player(sample_rate))
    except NoPlayback as error:
        say(f"Nothing can be played here: {error}")
        return None


if __name__ == "__main__":
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # end as Ctrl+C does
        signal.signal(getattr(signal, name), signal.default_int_handler)
    sys.exit(main())
