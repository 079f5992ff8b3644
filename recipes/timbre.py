"""The experiment that the training defaults come from: how near does a voice come, and how soon?

    python -m recipes.timbre                    # all settings, two at a time, then the table
    python -m recipes.timbre guide linear-5e-4  # some of them
    python -m recipes.timbre --table            # of what there is

A voice that the embedded model never heard, the one of `samples/`, reads sentences of the words
that the model knows; each of the settings is trained on them, a tenth held out; base and
checkpoints speak sentences that neither was trained on. (With `samples/` itself, whose words the
model can't read, what is measured is how it forgets to read.) What is done already stays; results
lie in `results/timbre-*`. Needs Debian's flite and the texts of `recipes.tiny.texts`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile

from fish_speech.evaluation.leaderboard import JSON_NAME, Leaderboard, ModelRow
from fish_speech.files import atomic_path, write_text
from fish_speech.models.text2semantic.lora import EMBEDDING_TARGETS, LINEAR_TARGETS
from recipes.tiny.texts import CACHE, read_sentences
from recipes.tiny.voices import SAMPLE_RATE, speak
from recipes.tiny.words import in_vocabulary

STEPS = (100, 300, 1000)
CLIPS, SENTENCES = 150, 16
RECORDINGS, DATA = CACHE / "timbre", Path("training_data/timbre")
_HELD_OUT = "data.validation_share=0.1"
TEXTS = CACHE / "timbre.txt"
_EMBEDDINGS = f"lora.targets=[{','.join(LINEAR_TARGETS + EMBEDDING_TARGETS)}]"  # upstream's
# Learning rate, what else is changed, and the steps at which it is measured.
SETTINGS: dict[str, tuple[float, tuple[str, ...], tuple[int, ...]]] = {
    "guide": (2e-5, (_EMBEDDINGS,), STEPS),
    "linear-2e-5": (2e-5, (), STEPS),
    "linear-1e-4": (1e-4, (), STEPS),
    "linear-5e-4": (5e-4, (), STEPS),
    "fast": (1e-4, ("lora=fast_r_8_alpha_160",), STEPS),
    "no-reference": (1e-4, ("data.reference_share=0",), STEPS[:2]),
    "half-reference": (1e-4, ("data.reference_share=0.5",), STEPS[:2]),
}


def program(name: str, *flags: object) -> None:
    """One of the three programs, on one core: two settings at a time are faster so."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{name}.py", *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")


def prepare() -> None:
    """Clips of the voice with a tenth held out, and the sentences to speak."""
    write_text(TEXTS, "\n".join(in_vocabulary_sentences("heldout.txt")[:SENTENCES]) + "\n")
    for number, text in enumerate(in_vocabulary_sentences("train.txt")[:CLIPS]):
        audio = RECORDINGS / f"{number:03d}.wav"
        if not audio.exists():
            write_text(audio.with_suffix(".txt"), text)
            with atomic_path(audio) as temporary:
                soundfile.write(temporary, speak(text, "rms"), SAMPLE_RATE, format="WAV")
    program(
        "prepare_dataset", "--input", RECORDINGS, "--output", DATA, "--speaker", "rms",
        "--normalize",
    )  # fmt: skip
    program(
        "finetune_tts", "--project", "timbre", "--data-dir", DATA, "--model-version", "tiny",
        "--extract-tokens", "--build-dataset", "--override", _HELD_OUT,
    )  # fmt: skip


def in_vocabulary_sentences(name: str) -> list[str]:
    """Those of the recipe's texts of which the embedded model knows every word."""
    return [text for text in read_sentences(name) if in_vocabulary(text)]


def run(name: str) -> None:
    """Train and measure one of the settings."""
    rate, overrides, steps = SETTINGS[name]
    project = ("--project", f"timbre-{name}", "--data-dir", DATA, "--model-version", "tiny")
    changes = (_HELD_OUT, *overrides)
    project += tuple(flag for change in changes for flag in ("--override", change))
    program(
        "finetune_tts", *project, "--train", "--max-steps", max(steps), "--learning-rate", rate,
        "--val-every", 100,
    )  # fmt: skip
    program(
        "finetune_tts", *project, "--evaluate", "--checkpoint-step", *steps, "--texts", TEXTS,
        "--eval-samples", SENTENCES,
    )  # fmt: skip


def table() -> str:
    """Markdown: a row for each of the settings, a column for each number of steps."""
    columns = "".join(f" {step} steps |" for step in STEPS)
    lines = [f"| | base |{columns}", "|---|---|" + "---|" * len(STEPS)]
    for name in SETTINGS:
        file = Path(f"results/timbre-{name}/evaluation") / JSON_NAME
        if file.is_file():
            rows = {row.step: row for row in Leaderboard.read(file).rows}
            cells = [_cell(rows[step]) if step in rows else "" for step in (0, *STEPS)]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: ModelRow) -> str:
    """Similarity, the half-width of its interval, and word errors."""
    similarity, wer = row.estimate("similarity"), row.estimate("wer")
    if similarity is None or wer is None:
        return "-"
    reach = (similarity.high - similarity.low) / 2
    return f"{similarity.mean:.2f} ± {reach:.2f}, {wer.mean:.0%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(SETTINGS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not args.table:
        try:
            prepare()
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run, args.names or SETTINGS))
        except (FileNotFoundError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
