#!/usr/bin/env python3
"""Text in, speech out: speaks with a trained voice, to a file, to the loudspeaker or both."""

from __future__ import annotations

if __name__ == "__main__":  # first, for the other imports take a moment
    from fish_speech.signals import exit_on_termination

    exit_on_termination()

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_speech.audio import SAVE_FORMATS
from fish_speech.console import complain, counted, is_interrupt, run_program, say, shorten_list
from fish_speech.devices import (
    PRECISIONS,
    resolve_device,
    resolve_device_and_dtype,
    triton_unavailable_reason,
)
from fish_speech.files import decode_text, read_text, shown_path
from fish_speech.resources import is_out_of_memory, set_threads
from fish_speech.signals import interrupt_on_termination

if TYPE_CHECKING:
    from fish_speech.conversation import Utterance
    from fish_speech.inference import Piece, Settings, TextToSpeech
    from fish_speech.inference.jobs import SpeechJob

OK, FAILED = 0, 1
OUT_OF_MEMORY = {  # what to try, by the kind of device
    "cpu": "--quantize int8, --precision bf16 or a shorter reference",
    "cuda": "--precision bf16, a shorter reference or --device cpu",
    "mps": "a shorter reference or --device cpu",
}
EPILOG = """\
exit status: 0 spoken; 1 some texts failed or have a gap; 2 bad usage, bad input or another error;
130 interrupted

examples:
  cli_tts.py "Hello there." --play
  cli_tts.py --text-file chapter.txt -o chapter.mp3
  cli_tts.py --text-file lines.txt --batch -o takes/
  cli_tts.py "Hello." --reference-audio me.wav --reference-text "What I say in it."
  cli_tts.py --compare checkpoints/me-merged 1.5 --texts lines.txt --reference-audio me.wav
"""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage='%(prog)s "TEXT" [options]  (--help lists them)',
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="?", help="what to speak; '-' reads standard input")
    add("--text-file", metavar="FILE", help="read the text from a UTF-8 file")
    add("--batch", action="store_true", help="one audio file for every line")
    add("-o", "--output", metavar="FILE",
        help=f"audio file ({', '.join(SAVE_FORMATS)}); with --batch a folder; '-' writes WAV to "
        "standard output (default: output/<first words>.wav, a free name; nothing with --play)")
    add("--play", action="store_true", help="play the speech while it is made")
    add("--trim-silence", action="store_true", help="cut silence at both ends")
    add("--debug", action="store_true", help="show the traceback of an error")

    add = parser.add_argument_group("voice").add_argument
    add("--model-path", metavar="DIR",
        help="model directory, or a model version as '1.5' or 'tiny' (default: the newest "
        "checkpoints/*-merged, else the published model, else tiny)")
    add("--list-voices", action="store_true", help="list the models there are")
    add("--speaker", metavar="NAME", help="speaker name, for a model with several")
    add("--reference-audio", metavar="FILE", action="append", default=[],
        help="a recording whose voice is cloned; repeatable")
    add("--reference-text", metavar="TEXT", action="append", default=[],
        help="what it says, one for each recording (default: the .lab or .txt beside it)")

    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.7,
        help="higher is more varied, 0 takes the most likely code (default: %(default)s)")
    add("--top-p", type=float, default=0.7,
        help="sample from the most likely codes of this total probability (default: %(default)s)")
    add("--repetition-penalty", type=float, default=1.2,
        help="above 1 makes codes of the last frames less likely (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same speech (default: 0)")
    add("--num-samples", type=int, default=1, metavar="N", help="N takes: seed, seed+1, ...")
    add("--max-new-tokens", type=int, metavar="N",
        help="longest speech of a chunk in frames (default: what its text can take)")
    add("--retries", type=int, metavar="N",
        help="further tries for a chunk that runs on or breaks off (default: 2, while it is "
        "played 0: what was heard can't be taken back)")

    add = parser.add_argument_group("comparing").add_argument
    add("--compare", nargs=2, metavar=("A", "B"),
        help="measure two models on the same texts; -o is the folder of the page with figures and "
        "players (default: output/A-against-B)")
    add("--texts", metavar="FILE", type=Path, help="these texts, one a line")
    add("--whisper-model", metavar="NAME", help="Whisper model for word error rates")
    add("--speaker-encoder", metavar="NAME", help="speaker embedding model (hub id or folder)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto",
        help="auto, cpu, cuda or mps (default: CUDA if any, else CPU)")
    add("--precision", choices=PRECISIONS, default="auto",
        help="of the language model (default: bf16 on CUDA that has it, else fp32)")
    add("--quantize", choices=("int8",),
        help="weights in a byte each: faster on a CPU with a large model, a little less exact")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="each frame as one CUDA graph, compiled once and kept (default: where CUDA is)")
    add("--threads", type=int, metavar="N",
        help="processor threads (default: one a core, but a single one for a small model)")
    return parser
# fmt: on


def main(argv: list[str] | None = None) -> int:
    return run_program(
        parse_arguments,
        work,
        argv,
        interrupted=lambda: say("\nInterrupted; what was not finished was not written."),
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.text and not any(word.startswith("-") for word in rest):
        parser.error(f'put the text in quotes: cli_tts.py "{" ".join([args.text, *rest])}"')
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    return args


def work(args: argparse.Namespace) -> int:
    with advice_on_memory(args):
        if args.compare or args.texts or args.whisper_model or args.speaker_encoder:
            return compare_models(args)
        return list_voices() if args.list_voices else speak(args)


@contextmanager
def advice_on_memory(args: argparse.Namespace) -> Iterator[None]:
    """Raise it as a `MemoryError` that says what to change where memory runs out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) or not is_out_of_memory(error):
            raise
        advice = OUT_OF_MEMORY[resolve_device(args.device).type]
        raise MemoryError(f"out of memory; try {advice}") from error


def setup_fish_speech(model_path: str | None = None) -> tuple[Path, Path]:
    """The repository's folder and the model directory to speak with; says which and why."""
    fish_speech_dir = Path(__file__).resolve().parent
    if model_path is not None:
        from fish_speech.hub import find_model

        path = find_model(model_path, fish_speech_dir)
        say(f"Voice: {shown_path(path)} (--model-path)")
        return fish_speech_dir, path

    # A voice of your own can be preferred here: return fish_speech_dir, Path("its directory").

    from fish_speech.hub import local_model_dirs

    path, what = local_model_dirs(fish_speech_dir)[0]
    why = what if path.name.endswith("-merged") else f"{what}; no checkpoints/*-merged is there"
    say(f"Voice: {shown_path(path)} ({why})")
    return fish_speech_dir, path


def list_voices() -> int:
    from fish_speech.hub import local_model_dirs
    from fish_speech.inference.speakers import list_speakers

    for path, what in local_model_dirs(Path(__file__).resolve().parent):
        speakers = ", ".join(list_speakers(path))
        print(shown_path(path), what, *([f"speakers: {speakers}"] if speakers else []), sep="\t")
    return OK


def speak(args: argparse.Namespace) -> int:
    """Arguments are checked before anything is loaded, or even downloaded."""
    jobs = plan_jobs(args, read_input_text(args))
    from fish_speech.inference.jobs import job_fingerprint, run_pending_jobs
    from fish_speech.inference.references import pair_references
    from fish_speech.inference.speakers import choose_speaker

    settings = synthesis_settings(args)
    references = pair_references(args.reference_audio, args.reference_text)
    resolve_device_and_dtype(args.device, args.precision, args.quantize)
    if args.threads is not None:
        set_threads(args.threads)
    _, model_dir = setup_fish_speech(args.model_path)
    args.speaker = choose_speaker(args.speaker, model_dir, say, cloned=bool(references))
    started = time.perf_counter()
    tts = load(args, model_dir)
    encoded = [tts.encode_reference(file, words) for file, words in references]
    say(f"Loaded in {time.perf_counter() - started:.1f} s")
    run_job = partial(attempt, args, tts, encoded, settings)
    if args.batch and not jobs[0].playback_only:
        fingerprint = job_fingerprint(
            *(model_dir, tts, references, settings),
            speaker=args.speaker,
            quantize=args.quantize,
            trim_silence=args.trim_silence,
        )
        done, skipped, failed, leftovers = run_pending_jobs(jobs, fingerprint, run_job)
        say(f"{done} synthesized, {skipped} skipped (already done), {failed} failed")
        if leftovers:
            say(f"left over from earlier batches: {shorten_list(map(str, leftovers))}")
    else:
        if not args.batch:
            tts.check(jobs[0].text, encoded, args.speaker, settings)
        failed = sum(not run_job(job) for job in jobs)
    return FAILED if failed else OK


def compare_models(args: argparse.Namespace) -> int:
    """Two models and a file of texts -> a folder with the page, whose path is printed."""
    if not (args.compare and args.texts):
        raise ValueError(
            "--compare A B and --texts FILE go together (--whisper-model, --speaker-encoder: only"
            " with them)"
        )
    if args.text or args.text_file or args.model_path or args.batch or args.play:
        raise ValueError("--compare speaks --texts FILE with its two models: give no other")
    if args.retries is not None or args.trim_silence:
        raise ValueError("--compare takes first tries as they are: no --retries, no --trim-silence")
    from fish_speech.evaluation.compare import compare_named

    device, _ = resolve_device_and_dtype(args.device, args.precision, args.quantize)
    if args.threads is not None:
        set_threads(args.threads)
    graphs = ["graphs"] if uses_cuda_graphs(args, device) else []
    board, page = compare_named(
        *(args.compare, args.texts, args.output),
        root=Path(__file__).resolve().parent,
        reference_audio=args.reference_audio,
        reference_text=args.reference_text,
        load=lambda model_dir: load(args, model_dir),
        loaded_as=[args.device, args.precision, args.quantize, *graphs],
        settings=synthesis_settings(args),
        takes=args.num_samples,
        speaker=args.speaker,
        whisper_model=args.whisper_model,
        speaker_encoder=args.speaker_encoder,
        device=args.device,
        say=say,
    )
    print(page)
    return FAILED if any(row.error for row in board.rows) else OK


def plan_jobs(args: argparse.Namespace, text: str) -> list[SpeechJob]:
    from fish_speech.inference.jobs import default_output, plan
    from fish_speech.text import split_lines

    takes, playback_only = args.num_samples, args.play and args.output is None
    if args.output == "-":
        if args.batch or takes > 1:
            raise ValueError("'-o -' takes one speech: no --batch and no --num-samples")
        if sys.stdout is None:
            raise ValueError("standard output is closed; give -o FILE")
        output = None
    else:
        output = (
            default_output(text, args.batch, takes) if args.output is None else Path(args.output)
        )
    jobs = plan(
        text, output, batch=args.batch, seed=args.seed, takes=takes, playback_only=playback_only
    )
    lines = len(split_lines(text))
    if args.batch and len(jobs) < lines * takes:
        say(f"{lines - len(jobs) // takes} of {counted(lines, 'line')} without words: left out")
    return jobs


def read_input_text(args: argparse.Namespace) -> str:
    if (args.text is None) == (args.text_file is None):
        text = 'a text (as in: cli_tts.py "Hello."; - reads standard input)'
        raise ValueError(f"give either {text} or --text-file FILE")
    if "-" in (args.text, args.text_file):
        if sys.stdin is None:
            raise ValueError("standard input is closed; give the text itself, or --text-file FILE")
        return decode_text(sys.stdin.buffer.read(), "standard input")
    if args.text is not None:
        if Path(args.text).suffix in (".txt", ".lab", ".md") and os.path.isfile(args.text):
            raise ValueError(f"{args.text}: a file; --text-file {args.text} speaks what is in it")
        return decode_text(os.fsencode(args.text), "the text")
    return read_text(args.text_file)


def load(args: argparse.Namespace, model_dir: Path) -> TextToSpeech:
    from fish_speech.inference import TextToSpeech
    from fish_speech.resources import set_threads_for_model, tune_malloc

    if args.threads is None:
        set_threads_for_model(model_dir / "model.pth")
    device, dtype = resolve_device_and_dtype(args.device, args.precision, args.quantize)
    wanted = args.compile if device.type == "cuda" else None
    if args.compile and not wanted:
        say("--compile is for CUDA: left out")
    elif uses_cuda_graphs(args, device):
        say("Compiling (some seconds, the first time)")
    tts = TextToSpeech.from_pretrained(
        model_dir, device=device, dtype=dtype, quantize=args.quantize, compile=wanted
    )
    tune_malloc()
    return tts


def uses_cuda_graphs(args: argparse.Namespace, device: Any) -> bool:
    """Whether each frame will be one CUDA graph, which samples otherwise."""
    return args.compile is not False and triton_unavailable_reason(device) is None


def synthesis_settings(args: argparse.Namespace) -> Settings:
    from fish_speech.inference import Sampling, Settings

    retries = Settings.retries if args.retries is None else args.retries
    sampling = Sampling(args.temperature, args.top_p, args.repetition_penalty)
    return Settings(sampling, args.seed, args.max_new_tokens, retries)


def attempt(
    args: argparse.Namespace,
    tts: TextToSpeech,
    references: list[Utterance],
    settings: Settings,
    job: SpeechJob,
) -> bool:
    """Speak one job; an error is printed, not raised, so that the others go on."""
    from fish_speech.inference.record import record_job

    def pieces(played: bool) -> Iterator[Piece]:
        retries = 0 if played and args.retries is None else settings.retries
        chosen = replace(settings, seed=job.seed, retries=retries)
        return tts.pieces(job.text, references, args.speaker, chosen)

    options = {"play": args.play, "trim_silence": args.trim_silence, "say": say}
    try:
        with advice_on_memory(args):
            return record_job(job, pieces, tts.sample_rate, **options).complete
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError) as error:
        if is_interrupt(error):
            raise
        if args.debug:
            traceback.print_exc()
        complain(error)
        return False


if __name__ == "__main__":
    interrupt_on_termination()
    sys.exit(main())
