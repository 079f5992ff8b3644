#!/usr/bin/env python3
"""Give the model a voice: the stages of `--help`, in order."""

from __future__ import annotations

if __name__ == "__main__":  # first, for the other imports take a moment
    from fish_speech.signals import exit_on_termination

    exit_on_termination()

import argparse
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fish_speech.console import counted, error_message, is_interrupt, run_program
from fish_speech.console import say as print_line
from fish_speech.devices import resolve_device, resolve_precision
from fish_speech.files import file_digest, shown_path
from fish_speech.resources import limit_threads, tune_malloc
from fish_speech.signals import interrupt_on_termination
from fish_speech.training.arguments import as_flag, build_parser, check_arguments, does_any_of

if TYPE_CHECKING:
    from fish_speech.datasets.shards import Manifest
    from fish_speech.evaluation.leaderboard import Leaderboard
    from fish_speech.training.config import RunConfig
    from fish_speech.training.resume import Start
    from fish_speech.training.runs import Run

OK, FAILED = 0, 1


def make_config(
    args: argparse.Namespace, data_dir: Path | None, remembered: Path | None = None
) -> RunConfig:
    """The run's config: what is given here over what is `remembered`, else over the defaults."""
    from fish_speech.training.config import config_of_flags

    return config_of_flags(vars(args), data_dir, remembered)


def prepare_stage(args: argparse.Namespace) -> None:
    """Recordings -> `training_data/<project>`."""
    from fish_speech.preparation.check import describe
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
    print(describe(summary))
    if not summary.clips:
        raise ValueError(f"{args.data_dir}: no clip came out of it, for the reasons above")
    say(f"{output}: {counted(len(summary.clips), 'clip')}, {summary.minutes} minutes")
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
    say(f"codes: {counted(result.made, 'clip')} encoded, {result.kept} up to date{share}")
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

    from fish_speech.datasets.shards import build_shards, no_validation_reason
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
        f"shards: {counted(len(manifest.train), 'clip')} to train on, "
        f"{len(manifest.validation)} held out" + ("" if rebuilt else " (unchanged)")
    )
    if not manifest.validation and config.data.validation_share:
        say(f"nothing is held out: {no_validation_reason(manifest)}")
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

        models = {"whisper_model": args.whisper_model, "speaker_encoder": args.speaker_encoder}
        more["callbacks"] = [
            During(Path(config.data.dir), base_dir, args.eval_every, say, **models)
        ]
    say(start.reason if start.checkpoint else f"{start.reason} {shown_path(base_dir)}")
    done = train(config, base_dir=base_dir, manifest=manifest, start=start, say=say, **more)
    run = done.checkpoint.path.parents[1]
    if not (start.resumes and done.checkpoint == start.checkpoint):
        say(f"trained: {done.checkpoint.path}; losses: {run / 'logs' / 'loss.png'}")
    return done.stopped_by


def evaluate_stage(args: argparse.Namespace, run: Run) -> Leaderboard | None:
    """Checkpoints -> `results/<project>/evaluation`; None where nobody asked and it failed."""
    from fish_speech.evaluation.held_out import NothingToMeasureError
    from fish_speech.evaluation.project import Request, evaluate

    try:
        board = evaluate(run, Request.of_flags(vars(args)), say)
    except BaseException as error:  # whatever it is, hours of training are worth a merge
        if args.evaluate or isinstance(error, SystemExit) or is_interrupt(error):
            raise
        if args.debug:
            traceback.print_exc()
        say(f"not evaluated: {error_message(error)}")  # the pipeline goes on
        args.failures += not isinstance(error, NothingToMeasureError)
        return None
    print(board.recommendation)
    args.failures += any(row.error for row in board.rows)
    return board


def merge_stage(args: argparse.Namespace, run: Run, board: Leaderboard | None) -> None:
    """Checkpoint -> `checkpoints/<project>-merged`; `board` is of this very command."""
    from fish_speech.hub import directory_of, find_model
    from fish_speech.training.merge import merge
    from fish_speech.training.resume import projects_over

    base_dir = args.pretrained_ckpt_path
    if args.model_version:
        base_dir = directory_of(args.model_version)
    lora = make_config(args, None).adapters if args.lora_config else None
    if args.checkpoint_path and not (args.train or args.full_pipeline):
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
    over = projects_over(run.folder.parent, folder)
    merged = merge(checkpoint, folder, base_dir=base_dir, lora=lora)
    say(
        f"merged: {folder}; the adapters move the logits by {merged.change:.2%}, "
        f"the written model is within {merged.error:.3%} of base + adapters"
    )
    if stranded := over and over - projects_over(run.folder.parent, folder):
        say(
            f"warning: {', '.join(sorted(stranded))} can't go on: trained over what {folder} was "
            "before; merging the same step as then (--checkpoint-step) brings that back"
        )
    print(f'speak with it: cli_tts.py "Hello there." --model-path {folder}')


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
            return 128 + stopped_by
    board = None
    if args.evaluate or (everything and args.evaluate is None):
        board = evaluate_stage(args, run)
    if everything or args.merge_weights or args.merge_best:
        merge_stage(args, run, board)
    return FAILED if args.failures else OK


def data_and_training(args: argparse.Namespace, run: Run) -> int | None:
    """The stages up to training. Returns the signal that stopped it early, if one did."""
    from fish_speech.datasets.clips import find_clips, is_raw, is_source_of
    from fish_speech.hub import find_model
    from fish_speech.training import distributed
    from fish_speech.training.resume import check_fits

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
        elif args.speaker:
            raise ValueError(
                f"--speaker {args.speaker}: {data_dir} is prepared, its folders name who speaks; "
                "leave the flag out"
            )
        elif not everything and is_source_of(prepared_dir(args), data_dir):
            raise ValueError(
                f"{data_dir}: recordings that are not prepared; what this project prepared is "
                f"--data-dir {prepared_dir(args)} (--prepare-data prepares these)"
            )
        if not (training or args.extract_tokens or args.build_dataset):
            return None
        find_clips(data_dir)  # which refuses what is no dataset before a model is downloaded
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
        if training and start.checkpoint:  # else another base's codec would encode all clips first
            digest = file_digest(base_dir / "model.pth")
            check_fits(start.checkpoint, config.adapters, digest, base_dir)
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
    """Where `--prepare-data` puts the dataset."""
    return Path("training_data") / args.project


def say(message: str) -> None:
    from fish_speech.training.distributed import is_rank_zero

    if is_rank_zero():
        print_line(message)


def main(argv: list[str] | None = None) -> int:
    going_on = "interrupted; what is finished stays, the same command goes on from there"
    return run_program(
        lambda argv: build_parser().parse_args(argv),
        work,
        argv,
        interrupted=lambda: say(going_on),
    )


def work(args: argparse.Namespace) -> int:
    args.failures = 0
    check_arguments(args)
    tune_malloc()
    limit_threads()
    return run_stages(args)


if __name__ == "__main__":
    interrupt_on_termination()
    sys.exit(main())
