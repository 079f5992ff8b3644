#!/usr/bin/env python3
"""Give the model a voice: from a data set to a merged model that cli_tts.py speaks with."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fish_speech.console import error_message, silence_stdout, tolerate_unencodable
from fish_speech.devices import resolve_device, resolve_precision
from fish_speech.resources import limit_threads, tune_malloc
from fish_speech.signals import interrupt_on_termination

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fish_speech.datasets.shards import Manifest
    from fish_speech.evaluation.leaderboard import Leaderboard
    from fish_speech.training.config import RunConfig
    from fish_speech.training.resume import Start
    from fish_speech.training.runs import Run

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
EPILOG = """\
exit codes: 0 done, 1 done but some clips or the evaluation failed, 2 bad usage or bad input,
  130 interrupted

examples:
  finetune_tts.py --project me --data-dir training_data/me --full-pipeline --max-steps 300
  finetune_tts.py --project me --list-checkpoints
  finetune_tts.py --project me --data-dir training_data/me --train --resume-latest --max-steps 600
  finetune_tts.py --project me --evaluate --merge-best
  finetune_tts.py --project me --merge-weights --checkpoint-step 500
"""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--project", required=True, metavar="NAME", help="the run, kept in results/NAME")
    add("--data-dir", type=Path, metavar="DIR", help="the data set, or raw recordings")
    add("--debug", action="store_true", help="show where an error came from")

    add = parser.add_argument_group("stages (can be combined)").add_argument
    add("--full-pipeline", action="store_true", help="all that is missing, to the merged model")
    add("--prepare-data", action="store_true", help="recordings -> training_data/NAME")
    add("--extract-tokens", action="store_true", help="clips -> codes")
    add("--build-dataset", action="store_true", help="codes -> shards")
    add("--train", action="store_true", help="shards -> checkpoints (packs first what is missing)")
    add("--merge-weights", action="store_true", help="checkpoint -> checkpoints/NAME-merged")
    add("--evaluate", action=argparse.BooleanOptionalAction,
        help="measure the base and every checkpoint; --full-pipeline does, unless --no-evaluate")
    add("--merge-best", action="store_true", help="merge the checkpoint that measured best")
    add("--list-checkpoints", action="store_true", help="what this project has")

    add = parser.add_argument_group("base model").add_argument
    add("--model-version", help="1.5 (default, downloaded once) or tiny (embedded)")
    add("--pretrained-ckpt-path", type=Path, metavar="DIR", help="a model directory instead")

    add = parser.add_argument_group("training").add_argument
    add("--max-steps", type=int, help="steps of this project in all (300)")
    add("--batch-size", type=int, help="utterances a micro-batch (4)")
    add("--learning-rate", type=float, help="peak learning rate (1e-4)")
    add("--gradient-accumulation-steps", type=int, metavar="N", help="micro-batches a step (1)")
    add("--lora-config", metavar="NAME", help="r_4_alpha_8, r_8_alpha_16 (default), r_16_alpha_32, "
        "or fast_r_8_alpha_160: timbre alone")
    add("--save-every", type=int, metavar="STEPS", help="between checkpoints (100)")
    add("--val-every", type=int, metavar="STEPS", help="between validations (as --save-every)")
    add("--keep-checkpoints", type=int, metavar="N", help="only the newest N (default: all)")
    add("--num-workers", type=int, help="processes that load batches (0)")
    add("--seed", type=int, help="random seed (42)")
    add("--override", action="append", default=[], metavar="KEY=VALUE",
        help="any other key of configs/text2semantic_finetune.yaml")

    add = parser.add_argument_group("resuming").add_argument
    add("--resume-latest", action="store_true",
        help="this project's newest checkpoint, else a warm start from the newest on the same data")
    add("--resume-from-checkpoint", metavar="FILE",
        help="resume this project's, or warm start from another's")
    add("--checkpoint-path", metavar="PATH",
        help="a file, or a folder's newest: resumed if it is this project's, else a warm start; "
        "with --merge-weights, the checkpoint to merge")
    add("--checkpoint-step", type=int, nargs="+", metavar="STEP",
        help="which to merge (default: the latest) or to measure (default: all)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-samples", type=int, metavar="N", help="texts that each model speaks (12)")
    add("--texts", type=Path, metavar="FILE", help="further texts to speak, one a line")
    add("--speaker-encoder", metavar="NAME", help="an x-vector model: on the hub, or a folder")
    add("--eval-every", type=int, metavar="STEPS", help="a small one in training, for TensorBoard")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="auto (default: CUDA, else CPU), cpu, cuda or mps")
    add("--force-mps", action="store_true", help="the same as --device mps")
    add("--precision", help="of the base: auto (default), fp32 or bf16")
    add("--devices", type=int, help="cards or processes on this machine (1)")
    add("--num-nodes", type=int, help="machines (1)")
    add("--strategy", help="Lightning's strategy, such as ddp")

    add = parser.add_argument_group("preparation and extraction").add_argument
    add("--speaker", help="who speaks in the recordings (default: the project)")
    add("--whisper-model", metavar="NAME",
        help="for recordings without a transcript (base), and for evaluating (what is at hand)")
    add("--batch-size-extract", type=int, default=8, help="clips encoded together (8)")
    add("--num-workers-extract", type=int, default=0, help="processes that decode clips (0)")
    return parser
# fmt: on


_STAGES = (
    *("full_pipeline", "prepare_data", "extract_tokens", "build_dataset", "train"),
    *("merge_weights", "merge_best", "evaluate", "list_checkpoints"),
)
_HEEDED_BY = {  # flags that are ignored elsewhere
    "resume_latest": ("train",),
    "resume_from_checkpoint": ("train",),
    "eval_every": ("train",),
    "checkpoint_path": ("train", "merge_weights"),
    "checkpoint_step": ("merge_weights", "merge_best", "evaluate"),
    "eval_samples": ("evaluate", "merge_best"),
    "texts": ("evaluate", "merge_best"),
    "speaker_encoder": ("evaluate", "merge_best", "eval_every"),
    "whisper_model": ("prepare_data", "evaluate", "merge_best", "eval_every"),
    "speaker": ("prepare_data",),
    "batch_size_extract": ("extract_tokens", "train"),
    "num_workers_extract": ("extract_tokens", "train"),
}
_POSITIVE = ("batch_size_extract", "eval_samples", "eval_every")  # the config checks its own


def make_config(
    args: argparse.Namespace, data_dir: Path | None, remembered: Path | None = None
) -> RunConfig:
    """The run's config: what is given here over what is `remembered`, else over the defaults."""
    from fish_speech.training.config import config_of_flags

    return config_of_flags(vars(args), data_dir, remembered)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` for impossible values and combinations."""
    if not any(getattr(args, stage) for stage in _STAGES):
        raise ValueError(f"nothing to do: give a stage ({', '.join(map(as_flag, _STAGES))})")
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{as_flag(name)} {value}: must be above 0")
    if args.force_mps:
        if args.device not in (None, "mps"):
            raise ValueError(f"--force-mps and --device {args.device} exclude each other")
        args.device = "mps"
    merged = args.merge_weights or args.full_pipeline
    measured = args.evaluate or args.merge_best
    if len(args.checkpoint_step or ()) > 1 and (merged or not measured):
        raise ValueError(
            "--checkpoint-step: one step can be merged, several with --evaluate or --merge-best"
        )
    if args.merge_best and (args.merge_weights or args.checkpoint_path):
        raise ValueError("--merge-best chooses by itself: leave the other flags out")
    if args.checkpoint_path and not (args.train or args.full_pipeline):
        if args.evaluate:
            raise ValueError(
                "--evaluate measures the project's own checkpoints: no --checkpoint-path"
            )
        if args.checkpoint_step:
            raise ValueError("--checkpoint-path names what to merge: no --checkpoint-step")
    parser = build_parser()
    for name, stages in _HEEDED_BY.items():
        if args.evaluate is False and "evaluate" in stages:
            continue  # --no-evaluate says by itself what they are worth
        if getattr(args, name) != parser.get_default(name) and not does_any_of(args, stages):
            names = " or ".join(map(as_flag, stages))
            raise ValueError(f"{as_flag(name)} belongs to {names}: leave it out here")
    if args.data_dir is None and any(getattr(args, stage) for stage in _STAGES[:5]):
        raise ValueError("--data-dir is missing: the data set, or the raw recordings")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def does_any_of(args: argparse.Namespace, stages: Sequence[str]) -> bool:
    """Whether one of these is asked for, by itself or as a part of `--full-pipeline`."""
    parts = _STAGES[1:6] if args.full_pipeline else ()
    if args.full_pipeline and args.evaluate is None:
        parts += ("evaluate",)
    return any(getattr(args, stage) or stage in parts for stage in stages)


def prepare_stage(args: argparse.Namespace) -> None:
    """Recordings -> `training_data/<project>`."""
    from fish_speech.preparation.pipeline import Options, prepare

    output = prepared_dir(args)
    say(f"preparing {args.data_dir} -> {output}")
    summary = prepare(
        Options(
            input=str(args.data_dir),
            output=output,
            speaker=args.speaker,
            normalize=True,
            split_long=True,
            auto_transcribe=True,
            whisper_model=args.whisper_model or Options.whisper_model,
            device=args.device or "auto",
        ),
        say=say,
    )
    if not summary.clips:
        raise ValueError(f"{args.data_dir}: no clip came out; see {output}/dataset_summary.json")
    say(f"{output}: {len(summary.clips)} clips, {summary.minutes} minutes")
    args.failures += summary.failed


def extract_stage(
    args: argparse.Namespace, config: RunConfig, base_dir: Path, rank: int, world_size: int
) -> set[str]:
    """Clips -> codes beside them; of several processes each encodes its share. Returns the names of
    those that failed."""
    from fish_speech.models.vqgan import load_codec
    from fish_speech.preparation.extract import extract_codes
    from fish_speech.resources import is_out_of_memory
    from fish_speech.training.distributed import gather, local_rank

    device = resolve_device(config.device)
    if world_size > 1 and str(device) == "cuda":
        device = resolve_device(f"cuda:{local_rank()}")
    try:
        result = extract_codes(
            Path(config.data.dir),
            load_codec(base_dir, device),
            base_dir,
            batch_size=args.batch_size_extract,
            num_workers=args.num_workers_extract,
            rank=rank,
            world_size=world_size,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError("out of memory; try --batch-size-extract 1") from error
    share = f" (this process's share of {world_size})" if world_size > 1 else ""
    say(f"codes: {result.made} clips encoded, {result.kept} up to date{share}")
    failed = gather(result.failed)
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    args.failures += len(failed)
    return set(failed)


def build_stage(
    args: argparse.Namespace, config: RunConfig, base_dir: Path, failed: set[str]
) -> Manifest:
    """Codes -> shards. Of clips that `failed` before all is said."""
    from tqdm import tqdm

    from fish_speech.datasets.shards import build_shards
    from fish_speech.models.text2semantic import ModelConfig

    model = ModelConfig.from_pretrained(base_dir)
    manifest, rebuilt = build_shards(
        Path(config.data.dir),
        num_codebooks=model.num_codebooks,
        codebook_size=model.codebook_size,
        validation_share=config.data.validation_share,
        progress=lambda clips: tqdm(clips, desc="packing", unit="clip", disable=None),
    )
    left_out = {name: why for name, why in manifest.skipped.items() if name not in failed}
    for reason in left_out.values():
        say(f"left out: {reason}")
    args.failures += len(left_out)
    say(
        f"shards: {len(manifest.train)} clips to train on, {len(manifest.validation)} held out"
        + ("" if rebuilt else " (unchanged)")
    )
    return manifest


def find_start(args: argparse.Namespace, config: RunConfig, run: Run) -> Start:
    """Where training goes on, or begins."""
    from fish_speech.hub import directory_of
    from fish_speech.training.resume import check_missing_base, choose_start

    base = directory_of(config.base) if names_base(args) else None
    start = choose_start(
        run,
        Path(config.data.dir),
        resume_latest=args.resume_latest,
        resume_from=args.resume_from_checkpoint,
        checkpoint_path=args.checkpoint_path,
        lora=config.adapters,
        base=base,
    )
    if base and base != Path(config.base) and not (base / "model.pth").exists():
        check_missing_base(start, base)
    return start


def names_base(args: argparse.Namespace) -> bool:
    keys = {text.partition("=")[0].lstrip("+") for text in args.override}
    given = (args.model_version, args.pretrained_ckpt_path)
    return given != (None, None) or not keys.isdisjoint(("base_model", "model"))


def train_stage(
    args: argparse.Namespace, config: RunConfig, base_dir: Path, start: Start, manifest: Manifest
) -> int | None:
    """Shards -> checkpoints. Returns the signal that stopped it early, if one did."""
    from fish_speech.training.train import train

    more = {}
    if args.eval_every:
        from fish_speech.evaluation.callback import EvaluateDuringTraining as During

        ears = {"whisper_model": args.whisper_model, "speaker_encoder": args.speaker_encoder}
        more["callbacks"] = [During(Path(config.data.dir), base_dir, args.eval_every, say, **ears)]
    say(start.reason)
    done = train(config, base_dir=base_dir, manifest=manifest, start=start, say=say, **more)
    run = done.checkpoint.path.parents[1]
    say(f"trained: {done.checkpoint.path}; losses: {run / 'logs' / 'loss.png'}")
    return done.stopped_by


def evaluate_stage(args: argparse.Namespace, run: Run) -> Leaderboard | None:
    """Checkpoints -> `results/<project>/evaluation`; None where nobody asked and it failed."""
    from fish_speech.evaluation.held_out import NothingToMeasureError
    from fish_speech.evaluation.project import Request, evaluate

    try:
        board = evaluate(run, Request.of_flags(vars(args)), say)
    except Exception as error:  # whatever it is, hours of training are worth a merge
        if args.evaluate:
            raise
        if args.debug:
            traceback.print_exc()
        say(f"not evaluated: {error}")  # the pipeline goes on
        args.failures += not isinstance(error, NothingToMeasureError)
        return None
    print(board.recommendation)
    args.failures += any(row.error for row in board.rows)
    return board


def merge_stage(args: argparse.Namespace, run: Run, board: Leaderboard | None) -> Path:
    """Checkpoint -> `checkpoints/<project>-merged`; `board` is of this very command."""
    from fish_speech.training.merge import merge

    base_dir, lora = args.pretrained_ckpt_path, None
    if args.checkpoint_path and not (args.train or args.full_pipeline):
        from fish_speech.hub import find_model
        from fish_speech.training.runs import named_checkpoint

        checkpoint = named_checkpoint(args.checkpoint_path)
        if not checkpoint.has_run_record():
            config = make_config(args, None)
            base_dir, lora = find_model(config.base), config.adapters
    elif args.merge_best:
        from fish_speech.evaluation.project import Request, recommended

        checkpoint = recommended(run, Request.of_flags(vars(args)), say, board)
    else:
        checkpoint = run.checkpoint(*args.checkpoint_step or ())
    folder = Path("checkpoints") / f"{run.project}-merged"
    advice = board and board.recommendation
    odd = advice and not args.merge_best and advice.step not in (None, checkpoint.step)
    say(
        f"merging {checkpoint.path}"
        + (", the latest; to merge only what measures best there is --merge-best" if odd else "")
    )
    merged = merge(checkpoint, folder, base_dir=base_dir, lora=lora)
    say(
        f"merged: {folder}; the adapters move the logits by {merged.change:.2%}, "
        f"the written model is within {merged.error:.3%} of base + adapters"
    )
    print(f'speak with it: cli_tts.py "Hello there." --model-path {folder}')
    return folder


def run_stages(args: argparse.Namespace) -> int:
    from fish_speech.training.distributed import is_rank_zero
    from fish_speech.training.runs import Run, describe_checkpoints

    run = Run.of(args.project)
    if args.list_checkpoints:
        print(describe_checkpoints(run))
    everything = args.full_pipeline
    if everything or args.prepare_data or args.extract_tokens or args.build_dataset or args.train:
        stopped_by = data_and_training(args, run)
        if not is_rank_zero():
            return OK  # the first process goes on, and answers for all
        if stopped_by is not None:
            named = "resume_from_checkpoint" if args.resume_from_checkpoint else "checkpoint_path"
            other = f"--resume-latest in place of {as_flag(named)}"
            say(f"stopped; {other if getattr(args, named) else 'the same command'} goes on")
            return INTERRUPTED if stopped_by == signal.SIGINT else 128 + stopped_by
    board = None
    if args.evaluate or (everything and args.evaluate is None):
        board = evaluate_stage(args, run)
    if everything or args.merge_weights or args.merge_best:
        merge_stage(args, run, board)
    return FAILED if args.failures else OK


def data_and_training(args: argparse.Namespace, run: Run) -> int | None:
    """The stages up to training. Returns the signal that stopped it early, if one did."""
    from fish_speech.datasets.clips import is_raw, is_source_of
    from fish_speech.hub import find_model
    from fish_speech.training import distributed

    everything, data_dir = args.full_pipeline, args.data_dir
    training = everything or args.train
    config = make_config(args, data_dir)  # which refuses what can't be before hours of preparing
    with distributed.process_group() as (rank, world_size):
        evaluates = does_any_of(args, ("evaluate", "merge_best", "eval_every"))
        if evaluates and distributed.is_rank_zero():
            from fish_speech.evaluation.project import Request, check_named

            check_named(Request.of_flags(vars(args)))  # for the same reason
        if args.prepare_data or (everything and is_raw(data_dir)):
            if distributed.is_rank_zero():
                prepare_stage(args)
            distributed.barrier()
            args.data_dir = data_dir = prepared_dir(args)  # for the stages after training too
            config.data.dir = str(data_dir)
        elif not everything and is_source_of(prepared_dir(args), data_dir):
            raise ValueError(
                f"{data_dir}: recordings that are not prepared; what this project prepared is "
                f"--data-dir {prepared_dir(args)} (--prepare-data prepares these)"
            )
        if not (training or args.extract_tokens or args.build_dataset):
            return None
        if training:
            start = find_start(args, config, run)
        goes_on = start.resumes if training else run.checkpoints()
        saved = run.restored_config() if goes_on else None
        if goes_on and saved is None:
            say(f"{run.saved_config}: missing, so what is not given here is as by default")
        if saved is not None:
            asked = config.device
            config = make_config(args, data_dir, saved)
            if not training:  # encoding and packing need no card that the training had
                config.device = asked
        elif training and start.checkpoint and not names_base(args):
            config.base_model = start.checkpoint.read()["run"]["base"]
        device = resolve_device(config.device, config.train.devices if training else 1)
        if training:
            resolve_precision(config.precision, device, training=True)
            if world_size > 1:
                distributed.check_trained_by(world_size, config.train)
        # The first process downloads or packs, the others then find what it made.
        base_dir = distributed.rank_zero_first(lambda: find_model(config.base))
        with distributed.dataset_lock(data_dir, say):
            # What Lightning starts finds the clips encoded, and the lock given back.
            failed: set[str] = set()
            if (training or args.extract_tokens) and (distributed.is_rank_zero() or world_size > 1):
                failed = extract_stage(args, config, base_dir, rank, world_size)
                distributed.barrier()
            if training or args.build_dataset:
                manifest = distributed.rank_zero_first(
                    lambda: build_stage(args, config, base_dir, failed)
                )
    return train_stage(args, config, base_dir, start, manifest) if training else None


def prepared_dir(args: argparse.Namespace) -> Path:
    """Where `--prepare-data` puts the data set."""
    return Path("training_data") / args.project


def say(message: str) -> None:
    from fish_speech.training.distributed import is_rank_zero

    if is_rank_zero():
        print(message, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    tolerate_unencodable()
    args = build_parser().parse_args(argv)
    args.failures = 0
    try:
        check_arguments(args)
        tune_malloc()
        limit_threads()
        code = run_stages(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        silence_stdout()
        return FAILED
    except KeyboardInterrupt:
        say("interrupted; what is finished stays, the same command goes on from there")
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # a panic of Rust code is no `Exception`
        if args.debug:
            raise
        expected = isinstance(error, ValueError | OSError | MemoryError)
        what = error_message(error)
        what = what if expected else f"{type(error).__name__}: {what} (--debug shows where)"
        print(f"error: {what}", file=sys.stderr)  # of every process, not only the first
        return BAD_INPUT


if __name__ == "__main__":
    interrupt_on_termination()
    sys.exit(main())
