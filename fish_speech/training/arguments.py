"""The flags of `finetune_tts.py`, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = (
    "Give the model a voice: from a dataset to a merged model that cli_tts.py speaks with."
)
EPILOG = """\
exit codes: 0 done, 1 done but some clips or the evaluation failed, 2 bad usage or bad input,
  130 interrupted (training: 143 by SIGTERM, 129 by a closed terminal)

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
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--project", required=True, metavar="NAME", help="the run, kept in results/NAME")
    add("--data-dir", type=Path, metavar="DIR", help="the dataset, or raw recordings")
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


_DATA_STAGES = ("full_pipeline", "prepare_data", "extract_tokens", "build_dataset", "train")
_STAGES = (*_DATA_STAGES, "merge_weights", "merge_best", "evaluate", "list_checkpoints")
_PIPELINE = ("prepare_data", "extract_tokens", "build_dataset", "train", "merge_weights")
_BELONGS_TO = {
    **dict.fromkeys(
        (
            "max_steps",
            "learning_rate",
            "gradient_accumulation_steps",
            "batch_size",
            "save_every",
            "val_every",
            "keep_checkpoints",
            "num_workers",
            "seed",
            "devices",
            "num_nodes",
            "strategy",
        ),
        ("train",),
    ),  # flags that no other stage reads
    "resume_latest": ("train",),
    "resume_from_checkpoint": ("train",),
    "eval_every": ("train",),
    "lora_config": ("train", "merge_weights"),
    "override": ("extract_tokens", "build_dataset", "train", "merge_weights"),
    "precision": ("train", "evaluate", "merge_best"),
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
    if args.model_version and args.pretrained_ckpt_path:
        raise ValueError("--model-version and --pretrained-ckpt-path exclude each other")
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
    for name, stages in _BELONGS_TO.items():
        if args.evaluate is False and "evaluate" in stages:
            continue  # --no-evaluate says by itself what they are worth
        if getattr(args, name) != parser.get_default(name) and not does_any_of(args, stages):
            names = " or ".join(map(as_flag, stages))
            raise ValueError(f"{as_flag(name)} belongs to {names}: leave it out here")
    if args.data_dir is None and any(getattr(args, stage) for stage in _DATA_STAGES):
        raise ValueError("--data-dir is missing: the dataset, or the raw recordings")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def does_any_of(args: argparse.Namespace, stages: Sequence[str]) -> bool:
    """Whether one of these is asked for, by itself or as a part of `--full-pipeline`."""
    parts = _PIPELINE if args.full_pipeline else ()
    if args.full_pipeline and args.evaluate is None:
        parts += ("evaluate",)
    return any(getattr(args, stage) or stage in parts for stage in stages)
