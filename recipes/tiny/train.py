"""Stage 4: train the transformer from random weights on the shards of the speech stage.

A stopped run goes on from its last checkpoint. The rate falls as a cosine over `--steps`, or over
`--minutes` of training where that ends first.

A text-to-speech language model takes longest to learn the alignment: which letter a frame speaks.
So a guided attention loss teaches one head in two of its layers to look at about the right letter,
and the rest of the model finds there what to say next.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fish_speech.conversation import IGNORE_INDEX
from fish_speech.devices import has_native_bf16
from fish_speech.models.text2semantic import DualARTransformer, load_model
from fish_speech.models.text2semantic.layers import rotary_table
from fish_speech.models.text2semantic.ops.torch_ops import rotate
from fish_speech.models.weights import read_checkpoint, save_tensors
from fish_speech.resources import tune_malloc
from fish_speech.worker_processes import die_with_parent
from recipes.tiny.batches import UNALIGNED, Corpus, batches, token_durations
from recipes.tiny.corpus import read_corpus
from recipes.tiny.model import new_model, tiny_tokenizer
from recipes.tiny.muon import Muon
from recipes.tiny.texts import CACHE
from recipes.tiny.voices import VOICES
from recipes.tiny.words import in_vocabulary

ADAM_LR, MUON_LR = 1.5e-3, 0.02  # peaks
WARMUP_STEPS, FINAL_LR_SHARE = 200, 0.01
GUIDED_LAYERS, GUIDED_REACH = (2, 3), 4  # whose first head is guided; letters either way
GUIDED_WEIGHT = 0.2  # of the guided attention loss
FAST_FRAMES = 120  # of about 460 in a batch: the fast transformer learns from a share of them
CHECKPOINT = "train.ckpt"


def hidden_states(model: DualARTransformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's `hidden_states` [B, T, D], and the attention logits [B, T, T] of the first head
    of `GUIDED_LAYERS` before the causal mask."""
    c = model.config
    x, logits = model.embed(tokens), []
    rotary = rotary_table(tokens.shape[-1], c.head_dim, c.rope_base, tokens.device)
    for number, layer in enumerate(model.layers):
        if number in GUIDED_LAYERS:
            heads = layer.attention.wqkv(layer.attention_norm(x)).unflatten(-1, (-1, c.head_dim))
            # The first query head and the first key head behind the queries.
            q, k = rotate(heads[:, :, [0, c.n_head]], rotary).unbind(2)  # [B, T, d]
            logits.append(q @ k.mT / math.sqrt(c.head_dim))
        x = layer(x, rotary, None, None)
    return x, logits


def guided_attention_loss(logits: Tensor, alignment: Tensor) -> Tensor:
    """Mean -log of the attention within `GUIDED_REACH` letters of the aligned one.

    `logits` [B, T, T] before the causal mask; `alignment` [B, T] of `batches.Item`.
    """
    columns = torch.arange(logits.shape[-1], device=logits.device)
    future = columns > columns[:, None]
    near = (columns - alignment[..., None]).abs() <= GUIDED_REACH  # [B, T, T]
    aligned = alignment != UNALIGNED  # [B, T]
    logits = logits.float().masked_fill(future, -torch.inf)
    inside = logits.masked_fill(~near, -torch.inf).logsumexp(-1)
    missing = torch.where(aligned, logits.logsumexp(-1) - inside, 0.0)
    return missing.sum() / aligned.sum()


def lr_share(step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to the final one at progress 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


class Run:
    """Model, optimizer and counters of a training run, saved and resumed whole.

    Several processes hold the same model and average their gradients: on a CPU, one thread each is
    faster than threads inside every operation, and keeps its pace on a machine that is shared.
    """

    def __init__(
        self, cache: Path, device: str, seed: int, *, compiled: bool, start: Path | None = None
    ) -> None:
        self.file = cache / CHECKPOINT
        self.device = device
        native = has_native_bf16(torch.device(device))
        self.autocast = partial(
            torch.autocast, torch.device(device).type, torch.bfloat16, enabled=native
        )
        # Every shape is known, so kernels are prepared once for each.
        prepare = partial(torch.compile, dynamic=False, disable=not compiled)
        self.hidden_states = prepare(hidden_states)
        self.codebook_logits = prepare(DualARTransformer.codebook_logits)
        self.model = new_model(seed).to(device).train()
        if start:
            self.model.load_state_dict(load_model(start).state_dict())
        parameters = list(self.model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        # All gradients lie in one vector, so that one all-reduce averages them and four figures.
        self.gradients = torch.zeros(sum(sizes) + 4, device=device)
        for parameter, piece in zip(parameters, self.gradients.split([*sizes, 4]), strict=False):
            parameter.grad = piece.view_as(parameter)
        # Muon learns the matrices of the blocks in fewer steps; each process computes its share.
        matrices = [
            p for name, p in self.model.named_parameters() if "layers." in name and p.dim() == 2
        ]
        chosen = {id(matrix) for matrix in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        self.shares = [matrices[owner :: world_size()] for owner in range(world_size())]
        self.muon = Muon(self.shares[rank()], lr=MUON_LR, weight_decay=0.01)
        self.adam = torch.optim.AdamW(
            others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            state = read_checkpoint(self.file, mapped=False)
            self.model.load_state_dict(state["model"])
            self.adam.load_state_dict(state["adam"])
            self.step, self.seconds = state["step"], state["seconds"]
        # A new order after each resume: nothing is repeated from where the last part began.
        self.generator = torch.Generator().manual_seed((seed + self.step) * 64 + rank())

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            # Muon's momentum, spread over the processes, is back within twenty steps.
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_tensors(state, self.file)

    def losses(self, tokens: Tensor, labels: Tensor, alignment: Tensor) -> Tensor:
        """Token loss of row 0, codebook loss of `FAST_FRAMES` random frames, guided attention loss:
        [3].

        The first two are the package's `loss_sums` for batches whose every shape is known.
        """
        tokens, labels, alignment = (part.to(self.device) for part in (tokens, labels, alignment))
        # Entered at every step: autocast keeps its copies of the weights until it is left.
        with self.autocast():
            hidden, attention = self.hidden_states(self.model, tokens)  # [B, T, D]
            token_logits = self.model.token_logits(hidden).float()
        token_loss = F.cross_entropy(
            token_logits.flatten(0, 1), labels[:, 0].flatten(), ignore_index=IGNORE_INDEX
        )
        guided = [guided_attention_loss(logits, alignment) for logits in attention]
        frames = (labels[:, 1] != IGNORE_INDEX).flatten().nonzero()[:, 0].cpu()
        # Some are drawn twice where there are too few, so that the shape never changes.
        draws = torch.rand(max(FAST_FRAMES, len(frames)), generator=self.generator).argsort()
        chosen = frames[draws[:FAST_FRAMES] % len(frames)].to(self.device)
        codes = labels[:, 1:].transpose(1, 2).flatten(0, 1)[chosen]  # [N, K]
        with self.autocast():
            hidden = hidden.flatten(0, 1)[chosen]
            logits = self.codebook_logits(self.model, hidden, codes).float()  # [N, K, C]
        codebook_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        return torch.stack([token_loss, codebook_loss, torch.stack(guided).mean()])

    def validate(self, held_out: Corpus, durations: np.ndarray) -> list[float]:
        """Mean losses on batches that no step trains on, without noise.

        Gradients stay enabled: what was compiled for training is used again.
        """
        generator = torch.Generator().manual_seed(0)
        source = batches(held_out, tiny_tokenizer(), durations, generator, plain=True)
        losses = [self.losses(*next(source)).detach() for _ in range(12)]
        return torch.stack(losses).mean(0).tolist()

    def update(self, batch: tuple[Tensor, ...], share: float) -> tuple[Tensor, Tensor]:
        """One step at a share of the peak rates.

        Returns losses [3] (token, codebook, guided attention) and the seconds trained, means over
        the processes.
        """
        self.adam.param_groups[0]["lr"] = ADAM_LR * share
        self.muon.param_groups[0]["lr"] = MUON_LR * share
        self.gradients.zero_()
        losses = self.losses(*batch)
        (losses[:2].sum() + GUIDED_WEIGHT * losses[2]).backward()
        self.gradients[-4:-1], self.gradients[-1] = losses.detach(), self.seconds
        if dist.is_initialized():
            dist.all_reduce(self.gradients)
        averages = self.gradients[-4:].cpu() / world_size()
        norm = self.gradients[:-4].norm() / world_size()
        self.gradients *= torch.clamp(1.0 / (norm + 1e-6), max=1.0) / world_size()
        self.adam.step()
        self.muon.step()
        if dist.is_initialized():
            sent = [
                dist.broadcast(matrix.data, owner, async_op=True)
                for owner, matrices in enumerate(self.shares)
                for matrix in matrices
            ]
            for message in sent:
                message.wait()
        self.step += 1
        return averages[:3], averages[3]


def rank() -> int:
    """The number of this process; 0 writes and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def in_vocabulary_only(corpus: Corpus) -> Corpus:
    """The utterances whose words are all of the templates' vocabulary."""
    return [(speaker, spoken) for speaker, spoken in corpus if in_vocabulary(spoken.text)]


def train(run: Run, training: Corpus, held_out: Corpus, args: argparse.Namespace) -> None:
    """Train to the end of the schedule; save and validate every `save_minutes`."""
    durations = token_durations(training, tiny_tokenizer())
    if args.closed:
        training, held_out = map(in_vocabulary_only, (training, held_out))
    source = batches(training, tiny_tokenizer(), durations, run.generator)
    bar = tqdm(total=args.steps, initial=run.step, unit="step", mininterval=5, disable=rank() > 0)
    seconds = saved = run.seconds
    began, means = time.monotonic() - run.seconds, torch.zeros(3)
    while (progress := max(run.step / args.steps, seconds / (60 * args.minutes))) < 1:
        share = args.peak * lr_share(run.step, progress)
        losses, mean_seconds = run.update(next(source), share)
        seconds, run.seconds = float(mean_seconds), time.monotonic() - began
        means = losses if not means.any() else 0.98 * means + 0.02 * losses
        bar.update()
        figures = "{:.3f} + {:.3f}, attention {:.3f}".format(*means)
        bar.set_postfix_str(f"loss {figures}, {progress:.1%} of the schedule", refresh=False)
        if rank() == 0 and seconds - saved >= 60 * args.save_minutes:
            saved = seconds
            run.save()
            report = f"step {run.step}, {seconds / 60:.0f} min: training {figures}"
            for kind, named in (("named", True), ("unnamed", False)):
                if part := [pair for pair in held_out if (pair[0] in VOICES) == named]:
                    known = run.validate(part, durations)
                    report += "; {} {:.3f} + {:.3f}".format(kind, *known)
            bar.write(report, sys.stderr)
    bar.close()
    if rank() == 0:
        run.save()


def work(process: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One of `args.processes` processes of a run."""
    if args.processes > 1:
        die_with_parent()  # else they would train on, into the same file
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=process, world_size=args.processes
        )
    tune_malloc()
    torch._dynamo.config.recompile_limit = 32  # one for every bucket
    compiled = not args.no_compile
    run = Run(args.cache, args.device, args.seed, compiled=compiled, start=args.start)
    kind = torch.device(args.device).type
    # Flash attention's backward is slow at these lengths on a CPU.
    backends = [SDPBackend.MATH] if kind == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        train(run, *read_corpus(args.cache), args)
    if args.processes > 1:
        dist.barrier()  # the last checkpoint is being written
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the shards")
    parser.add_argument("--start", type=Path, help="model directory whose weights to train on")
    parser.add_argument("--peak", type=float, default=1.0, help="share of the peak rates")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule earlier")
    parser.add_argument(
        "--closed", action="store_true", help="only sentences of the templates' vocabulary"
    )
    parser.add_argument("--save-minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--processes", type=int, default=1 if cuda else 2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="start at once, train slower")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"{folder}/rendezvous"
        if args.processes > 1:
            torch.multiprocessing.spawn(work, (args, rendezvous), nprocs=args.processes)
        else:
            work(0, args, rendezvous)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
