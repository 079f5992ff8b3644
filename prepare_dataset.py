"""Turn recordings into a dataset: short clips at 44.1 kHz, each with its transcript."""

from __future__ import annotations

if __name__ == "__main__":  # first, for the other imports take a moment
    from fish_speech.signals import exit_on_termination

    exit_on_termination()

import argparse
import sys
from pathlib import Path

from fish_speech.console import counted, run_program, say
from fish_speech.preparation.options import WHISPER_BACKENDS, Options, Thresholds
from fish_speech.signals import interrupt_on_termination


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done, 1 some inputs failed or a problem was found, "
        "2 bad usage, bad input or a full disk, 130 interrupted",
    )
    add = parser.add_argument
    add("--input", help="a recording, a folder of them, or a web address with --youtube")
    add("--output", type=Path, help="the dataset, usually training_data/NAME")
    add("--check", type=Path, metavar="DIR", help="look at a dataset, change nothing in it")
    add("--report", action="store_true", help="also write report.html beside the summary")
    add("--speaker", help="who speaks (default: the subfolder, else the name of the output)")
    add("--strict", action="store_true", help="stop at the first recording that fails")
    add("--num-workers", type=int, default=Options.num_workers, metavar="COUNT",
        help="worker processes (default: by the number of recordings and CPU cores)")  # fmt: skip
    add("--debug", action="store_true", help="show where an error came from")

    add = parser.add_argument_group("YouTube").add_argument
    add("--youtube", action="store_true", help="--input is a video or a playlist on the web")
    add("--max-duration", type=float, metavar="MINUTES",
        help="use only the first minutes of each recording")  # fmt: skip
    add("--cookies", metavar="FILE", help="a cookie file, for videos that ask for a login")
    add("--cookies-from-browser", metavar="NAME", help="take the cookies of this browser")

    add = parser.add_argument_group("sound").add_argument
    add("--normalize", action="store_true", help="bring every clip to -23 LUFS, peaks under -1 dB")
    add("--split-long", action="store_true", help="cut long recordings at pauses, trim short ones")
    add("--segment-duration", type=float, metavar="SECONDS", default=Options.segment_duration,
        help="how long a clip should be, in seconds (%(default)g)")  # fmt: skip
    add("--min-duration", type=float, metavar="SECONDS", default=Options.min_duration,
        help="the shortest clip of use, in seconds (%(default)g)")  # fmt: skip

    add = parser.add_argument_group("transcripts").add_argument
    add("--auto-transcribe", action="store_true", help="recognise what has no transcript")
    add("--whisper-model", default=Options.whisper_model,
        help="its name, or the path of a checkpoint (%(default)s)")  # fmt: skip
    add("--whisper-backend", choices=WHISPER_BACKENDS, default=Options.whisper_backend,
        help="openai-whisper or faster-whisper (the faster one where it is installed)")  # fmt: skip
    add("--language", help="what is spoken, such as en (default: detected for each recording)")
    add("--device", default=Options.device, help="auto, cpu, cuda or mps, for whisper")

    group = parser.add_argument_group("quality", "what a clip must keep to, not to be flagged")
    add = group.add_argument
    add("--drop-flagged", action="store_true", help="move flagged clips to rejected/")
    for flag, metavar, meaning in (
        ("--longest", "SECONDS", "duration in seconds"),
        ("--min-snr", "DB", "speech above the noise, in dB"),
        ("--min-speech", "SHARE", "share of the clip that is speech, 0 to 1"),
        ("--max-clipping", "SHARE", "share of clipped samples, 0 to 1"),
        ("--max-edge", "DB", "level at a cut against the speech, in dB"),
        ("--min-rate", "LETTERS", "letters a second of speech"),
        ("--max-rate", "LETTERS", "letters a second of speech"),
        ("--max-disagreement", "SHARE", "character error rate against the recogniser, 0 to 1"),
        ("--max-no-speech", "PROBABILITY", "whisper's probability that nobody speaks, 0 to 1"),
        ("--max-unheard", "SECONDS", "seconds of speech without a word that whisper heard"),
    ):
        default = getattr(Thresholds, flag.removeprefix("--").replace("-", "_"))
        add(flag, type=float, metavar=metavar, default=default, help=f"{meaning} (%(default)g)")
    return parser


_NOT_WHEN_CHECKING = (
    *("output", "speaker", "strict", "youtube", "max_duration", "cookies", "cookies_from_browser"),
    *("normalize", "split_long", "segment_duration", "drop_flagged"),
    *("max_no_speech", "max_unheard"),
)


def make_options(arguments: argparse.Namespace) -> Options:
    """The options that a command line means. Raises `ValueError` for impossible combinations."""
    given = dict(vars(arguments))
    if (given["check"] is None) == (given["input"] is None):
        raise ValueError("give either --input with --output, or --check")
    if given["check"] is None and given["output"] is None:
        raise ValueError("--input needs --output, the folder of the dataset")
    if given["check"] is not None:
        parser = build_parser()
        for name in _NOT_WHEN_CHECKING:
            if given[name] != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} has no part in --check: leave it out")
    given["input"] = str(given["input"] or given["check"])
    given["output"] = given["output"] or Path(given["input"])
    names = set(Options.__dataclass_fields__)
    limits = {name: given[name] for name in Thresholds.__dataclass_fields__ if name in given}
    return Options(
        **{name: value for name, value in given.items() if name in names},
        thresholds=Thresholds(**limits),
    )


def run(arguments: argparse.Namespace) -> int:
    from fish_speech.preparation.check import check, has_blocking_flags
    from fish_speech.preparation.pipeline import prepare
    from fish_speech.preparation.sources import is_data_set

    options = make_options(arguments)
    if arguments.check is not None:
        summary = check(options, say=say)
        show(summary, arguments)
        return 1 if summary.failed or has_blocking_flags(summary) or not summary.clips else 0
    summary = prepare(options, say=say)
    show(summary, arguments)
    last = f"{options.output}: {counted(len(summary.clips), 'clip')}, {summary.minutes} minutes"
    if summary.failed:
        last += f"; {counted(summary.failed, 'input')} failed, named above with the reason"
    print(last)
    if summary.failed or not summary.clips:
        return 1
    # A dataset that is prepared once more is being checked.
    return 1 if is_data_set(options.input) and has_blocking_flags(summary) else 0


def show(summary, arguments: argparse.Namespace) -> None:
    from fish_speech.preparation.check import describe

    print(describe(summary))
    if arguments.report:
        from fish_speech.preparation.report import write_report

        print(f"Report: {write_report(summary, arguments.check or arguments.output)}")


def main(argv: list[str] | None = None) -> int:
    return run_program(
        lambda argv: build_parser().parse_args(argv),
        run,
        argv,
        interrupted=lambda: say("interrupted; the same command goes on from here"),
    )


if __name__ == "__main__":
    interrupt_on_termination()
    sys.exit(main())
