"""Print how close each piece of work comes to the limit of this machine, measured in this run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from benchmarks.codec import codec_decode_bf16_row, codec_decode_fp32_row, codec_encode_row
from benchmarks.data import extract_row, pack_row
from benchmarks.generate import (
    generate_bf16_row,
    generate_fp32_row,
    generate_int8_row,
    generate_late_row,
)
from benchmarks.load import load_row
from benchmarks.measure import BenchmarkRow
from benchmarks.prepare import prepare_long_row, prepare_row
from benchmarks.startup import startup_row
from benchmarks.synthesis import synthesis_first_row, synthesis_int8_row
from benchmarks.train import train_auto_row, train_fp32_row, train_long_row, train_mixed_row
from fish_speech.files import write_json

ROWS: dict[str, Callable[[str], BenchmarkRow]] = {
    "load": load_row,
    "train_fp32": train_fp32_row,
    "train_auto": train_auto_row,
    "train_mixed": train_mixed_row,
    "train_long": train_long_row,
    "generate_fp32": generate_fp32_row,
    "generate_bf16": generate_bf16_row,
    "generate_int8": generate_int8_row,
    "generate_late": generate_late_row,
    "codec_decode_fp32": codec_decode_fp32_row,
    "codec_decode_bf16": codec_decode_bf16_row,
    "codec_encode": codec_encode_row,
    "synthesis_int8": synthesis_int8_row,
    "synthesis_first": synthesis_first_row,
    "extract": extract_row,
    "pack": pack_row,
    "startup": startup_row,
    "prepare": prepare_row,
    "prepare_long": prepare_long_row,
}


# By default: what takes minutes on a CPU is left to cards, what happens on a CPU only to CPUs.
_FOR_CARDS = {"train_long"}
_FOR_CPUS = {"load", "generate_int8", "pack", "startup", "prepare", "prepare_long"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=ROWS,
        help=f"measure this row, may be repeated (of: {', '.join(ROWS)})",
    )
    parser.add_argument("--device", default="cpu", help="where the model works (default: cpu)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there as well")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failed row")
    return parser


def as_json(row: BenchmarkRow) -> dict[str, object]:
    return {
        "name": row.name,
        "figure": row.figure,
        "unit": row.unit,
        "limit": row.limit,
        "fraction": row.fraction,
        "peak_memory_gb": row.peak_memory_gb,
    }


def as_table(rows: list[BenchmarkRow]) -> str:
    lines = [
        f"{'name':<20}{'figure':>9}{'limit':>9} {'unit':<9}{'of limit':>9}{'peak GB':>9}  what"
    ]
    for row in rows:
        figures = f"{row.figure:>9.3g}{row.limit:>9.3g} {row.unit:<9}"
        shares = f"{row.fraction:>9.0%}{row.peak_memory_gb:>9.2f}"
        lines.append(f"{row.name:<20}{figures}{shares}  {row.workload}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure the rows that are asked for. Exit code 1 where one of them failed."""
    args = build_parser().parse_args(argv)
    rows, failed = [], 0
    left_out = _FOR_CARDS if args.device == "cpu" else _FOR_CPUS
    names = list(dict.fromkeys(args.only or (name for name in ROWS if name not in left_out)))
    for name in (progress := tqdm(names, unit="row", disable=None, leave=False)):
        progress.set_description(name)
        try:
            rows.append(ROWS[name](args.device))
        except KeyboardInterrupt:
            return 130
        except Exception as error:  # the other rows still count
            if args.debug:
                raise
            failed += 1
            progress.write(f"{name}: {error}", file=sys.stderr)
    print(as_table(rows))
    if args.json:
        write_json(args.json, [as_json(row) for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
