"""Turn recordings into a data set: short clips at 44.1 kHz, each with its transcript."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done, 1 some inputs failed or a problem was found, "
        "2 bad usage or bad input, 130 interrupted",
    )
    add = parser.add_argument
    add("--input", required=True, help="a recording or a folder of them")
    add("--output", required=True, type=Path, help="the data set, usually training_data/NAME")
    add("--speaker", help="who speaks (default: the subfolder, else the name of the output)")
    add("--normalize", action="store_true", help="bring every clip to -23 LUFS, peaks under -1 dB")
    add("--split-long", action="store_true", help="cut long recordings at pauses, trim short ones")
    add("--segment-duration", type=float, default=10.0, help="seconds a clip is to last (10)")
    add("--auto-transcribe", action="store_true", help="recognise what has no transcript")
    add("--num-workers", type=int, default=0, help="processes (default: as many as pay)")
    add("--strict", action="store_true", help="stop at the first recording that fails")
    add("--debug", action="store_true", help="show where an error came from")
    return parser


def say(message: str) -> None:
    print(message, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    debug = arguments.pop("debug")
    from fish_speech.preparation.pipeline import Options, prepare

    try:
        summary = prepare(Options(**arguments), say=say)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    except (ValueError, OSError) as error:
        if debug:
            raise
        say(f"error: {error}")
        return 2
    for entry in summary.skipped:
        say(f"skipped {entry['source']}: {entry['reason']}")
    flagged = sum(bool(clip["flags"]) for clip in summary.clips)
    print(
        f"{arguments['output']}: {len(summary.clips)} clips, {summary.minutes} minutes, "
        f"{len(summary.speakers)} speakers, {flagged} flagged, {summary.failed} inputs failed"
    )
    return 1 if summary.failed or not summary.clips else 0


if __name__ == "__main__":
    sys.exit(main())
