"""Stage 4: train the transformer from random weights on the shards of the speech stage.

A stopped run goes on from its last checkpoint. The rate falls as a cosine over `--steps`, or over
`--minutes` of training where that ends first.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fish_speech.conversation import IGNORED
from fish_speech.files import atomic_path
from fish_speech.models.text2semantic import DualARTransformer
from recipes.tiny.batches import Mixture, batches
from recipes.tiny.corpus import read_corpus
from recipes.tiny.model import new_model, tiny_tokenizer
from recipes.tiny.texts import CACHE

ADAM_RATE, MUON_RATE = 1.5e-3, 0.02  # peaks
WARM_UP, LAST_SHARE = 200, 0.01
SHORT_PART = 0.85  # of the schedule has single, short utterances only
FAST_FRAMES = 120  # of about 460 in a batch: the fast transformer learns from a share of them
VALIDATION = 256  # utterances at the end of the corpus, never trained on
CHECKPOINT = "train.ckpt"


def loss(
    model: DualARTransformer, tokens: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token loss of row 0 and codebook loss of `FAST_FRAMES` frames chosen at random.

    The package's `loss_sums` for batches whose every shape is known, so that kernels are prepared
    once and not at every step.
    """
    # Entered at every step: autocast keeps its copies of the weights until it is left.
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model.hidden_states(tokens)  # [B, T, D]
        token_logits = model.token_logits(hidden).float()
    token_loss = F.cross_entropy(
        token_logits.flatten(0, 1), labels[:, 0].flatten(), ignore_index=IGNORED
    )
    frames = (labels[:, 1] != IGNORED).flatten().nonzero()[:, 0].cpu()
    # Some are drawn twice where there are too few, so that the shape never changes.
    draws = torch.rand(max(FAST_FRAMES, len(frames)), generator=generator).argsort()
    chosen = frames[draws[:FAST_FRAMES] % len(frames)].to(tokens.device)
    codes = labels[:, 1:].transpose(1, 2).flatten(0, 1)[chosen]  # [N, K]
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model.codebook_logits(hidden.flatten(0, 1)[chosen], codes).float()  # [N, K, C]
    return token_loss, F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def rate_share(step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to the last as progress goes to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_SHARE + (1 - LAST_SHARE) * cosine)


def validate(model: DualARTransformer, held_out: list, device: str) -> tuple[float, float]:
    """Mean token and codebook loss on batches that no step trains on, without noise.

    Gradients stay enabled: what was compiled for training is used again.
    """
    generator = torch.Generator().manual_seed(0)
    plain = Mixture(joined=0, referenced=0, unnamed=0, noise=0)
    source = batches(held_out, tiny_tokenizer(), plain, generator)
    losses = [
        torch.stack(loss(model, tokens.to(device), labels.to(device), generator)).detach()
        for tokens, labels in (next(source) for _ in range(12))
    ]
    token_loss, codebook_loss = torch.stack(losses).mean(0).tolist()
    return token_loss, codebook_loss


class Run:
    """Model, optimizer and counters of a training run, saved and resumed whole.

    Several processes hold the same model and average their gradients: on a CPU, one thread each is
    faster than threads inside every operation, and keeps its pace on a machine that is shared.
    """

    def __init__(self, cache: Path, device: str, seed: int) -> None:
        self.file = cache / CHECKPOINT
        self.device = device
        self.model = new_model(seed).to(device).train()
        parameters = list(self.model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        # All gradients lie in one vector, so that one message carries them and three figures.
        self.gradients = torch.zeros(sum(sizes) + 3, device=device)
        for parameter, piece in zip(parameters, self.gradients.split([*sizes, 3]), strict=False):
            parameter.grad = piece.view_as(parameter)
        # Muon learns the matrices of the blocks in fewer steps; each process computes its share.
        matrices = [
            p for name, p in self.model.named_parameters() if "layers." in name and p.dim() == 2
        ]
        chosen = {id(matrix) for matrix in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        self.shares = [matrices[owner :: world_size()] for owner in range(world_size())]
        self.muon = torch.optim.Muon(self.shares[rank()], lr=MUON_RATE, weight_decay=0.01)
        self.adam = torch.optim.AdamW(
            others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, map_location=device, weights_only=True)
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
        with atomic_path(self.file) as temporary:
            torch.save(state, temporary)

    def update(self, tokens: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """One step at a share of the peak rates.

        Returns losses [2] (token, codebook) and the seconds trained, means over the processes.
        """
        self.adam.param_groups[0]["lr"] = ADAM_RATE * share
        self.muon.param_groups[0]["lr"] = MUON_RATE * share
        self.gradients.zero_()
        tokens, labels = tokens.to(self.device), labels.to(self.device)
        losses = torch.stack(loss(self.model, tokens, labels, self.generator))
        losses.sum().backward()
        self.gradients[-3:-1], self.gradients[-1] = losses.detach(), self.seconds
        if dist.is_initialized():
            dist.all_reduce(self.gradients)
        figures = self.gradients[-3:].cpu() / world_size()
        norm = self.gradients[:-3].norm() / world_size()
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
        return figures[:2], figures[2]


def rank() -> int:
    """The number of this process; 0 writes and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def train(run: Run, corpus: list, args: argparse.Namespace) -> None:
    """Train to the end of the schedule; save and validate every `save_minutes`."""
    training, held_out = corpus[:-VALIDATION], corpus[-VALIDATION:]
    sources = [
        batches(training, tiny_tokenizer(), mixture, run.generator)
        for mixture in (Mixture(joined=0, referenced=0, longest=128), Mixture())
    ]
    bar = tqdm(total=args.steps, initial=run.step, unit="step", mininterval=5, disable=rank() > 0)
    seconds = saved = run.seconds
    began, means = time.monotonic() - run.seconds, torch.zeros(2)
    while (progress := max(run.step / args.steps, seconds / (60 * args.minutes))) < 1:
        # Short utterances first: the alignment of letters and frames is found on them.
        tokens, labels = next(sources[progress > SHORT_PART])
        losses, mean_seconds = run.update(tokens, labels, rate_share(run.step, progress))
        seconds, run.seconds = float(mean_seconds), time.monotonic() - began
        means = losses if not means.any() else 0.98 * means + 0.02 * losses
        bar.update()
        figures = f"{means[0]:.3f} + {means[1]:.3f}"
        bar.set_postfix_str(f"loss {figures}, {progress:.1%} of the schedule", refresh=False)
        if rank() == 0 and seconds - saved >= 60 * args.save_minutes:
            saved = seconds
            run.save()
            token_loss, codebook_loss = validate(run.model, held_out, run.device)
            report = f"step {run.step}, {seconds / 60:.0f} min: training {figures}"
            bar.write(f"{report}, held out {token_loss:.3f} + {codebook_loss:.3f}", sys.stderr)
    bar.close()
    if rank() == 0:
        run.save()


def work(process: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One of `args.processes` processes of a run."""
    if args.processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=process, world_size=args.processes
        )
    run = Run(args.cache, args.device, args.seed)
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 32  # one for every bucket, with and without grad
        run.model.hidden_states = torch.compile(run.model.hidden_states, dynamic=False)
        run.model.codebook_logits = torch.compile(run.model.codebook_logits, dynamic=False)
    kind = torch.device(args.device).type
    # Flash attention's backward is slow at these lengths on a CPU.
    backends = [SDPBackend.MATH] if kind == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        train(run, read_corpus(args.cache), args)


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the shards")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule earlier")
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
