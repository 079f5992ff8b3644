"""A frame as one CUDA graph: some 270 kernels of a few microseconds each are launched as one.

Imported only where it is needed: Triton exists for Linux only, and needs a C compiler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fish_speech.devices import to_host_async
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.decode.triton_kernels import (
    Stack,
    begin,
    launch_head,
    launch_options,
    place_of,
    wait,
)
from fish_speech.models.text2semantic.layers import KeyValueCache

_BISECTION_STEPS = 24  # for the top-p threshold
_SAMPLE_WARPS = 4


@triton.jit(do_not_specialize=["ROW"])
def _sample(
    logits, generated, uniforms, settings, counter, table, hidden, x, ROW, D, N: tl.constexpr,
    FIRST: tl.constexpr, COPIES: tl.constexpr, CODEBOOKS: tl.constexpr,
    BISECTION_STEPS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sample a code from logits [N], as `cpu_sampling.sample_id` does, into generated [frames, K].

    Its embedding, a row of `table` [C, D], is the fast transformer's next input: it is copied into
    the last column of x.
    """
    begin(PDL)
    v, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    frame = tl.load(counter)
    penalty, top_p, temperature = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    window = tl.load(settings + 3).to(tl.int32)
    u = tl.load(uniforms + frame * CODEBOOKS + ROW)
    repeats = v < 0
    for back in tl.static_range(1, WINDOW + 1):
        seen = (back <= window) & (frame > back)  # never the first frame
        code = tl.load(generated + (frame - back) * CODEBOOKS + ROW, mask=seen, other=-1)
        repeats = repeats | (v == code)
    wait(PDL)
    scores = tl.load(logits + v, mask=v < N, other=-float("inf"))
    changed = tl.where(scores < 0, scores * penalty, scores / penalty)
    scores = tl.where(repeats, changed, scores)
    largest = tl.max(scores, 0)
    weights = tl.exp(scores - largest)
    # The smallest weight within top-p: all weights from it on sum up to at most `limit`.
    limit, threshold, lower = top_p * tl.sum(weights, 0), 1.0, 0.0
    for _ in range(BISECTION_STEPS):
        middle = (threshold + lower) * 0.5
        fits = tl.sum(tl.where(weights >= middle, weights, 0.0), 0) <= limit
        threshold, lower = tl.where(fits, middle, threshold), tl.where(fits, lower, middle)
    in_top_p = (v < N) & (weights >= tl.where(top_p < 1, threshold, 0.0))
    weights = tl.where(in_top_p, tl.exp((scores - largest) / tl.maximum(temperature, 1e-5)), 0.0)
    cumulative = tl.cumsum(weights, 0)
    reached = (cumulative >= u * tl.sum(weights, 0)) & (weights > 0)
    sampled = tl.min(tl.where(reached, v, BLOCK), 0)
    last = tl.max(tl.where(weights > 0, v, 0), 0)
    sampled = tl.where(temperature > 0, tl.minimum(sampled, last), tl.argmax(scores, 0))
    tl.store(generated + frame * CODEBOOKS + ROW, sampled.to(tl.int64))
    if FIRST:
        code = tl.maximum(sampled - 1, 0)  # row 0 is the end of speech
        if COPIES:
            tl.store(x + d, tl.load(hidden + d, mask=d < D, other=0.0), mask=d < D)
        to = x + D + d
    else:
        code, to = sampled, x + d
    row = tl.load(table + code * D + d, mask=d < D, other=0.0)
    tl.store(to, row.to(tl.float32), mask=d < D)


@triton.jit
def _embed(
    generated, counter, text, codes, x, first_id, CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Embed the frame's codes as the slow transformer's next input column x [D]."""
    begin(PDL)
    d = tl.arange(0, BLOCK)
    frame_codes = generated + tl.load(counter) * CODEBOOKS
    wait(PDL)
    code = tl.maximum(tl.load(frame_codes) - 1, 0)
    total = tl.load(text + (first_id + code) * D + d, mask=d < D, other=0.0).to(tl.float32)
    total += tl.load(codes + code * D + d, mask=d < D, other=0.0).to(tl.float32)
    for book in tl.static_range(1, CODEBOOKS):
        row = tl.load(frame_codes + book) + book * CODEBOOK_SIZE
        total += tl.load(codes + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(x + d, total, mask=d < D)


@triton.jit
def _advance_counter(counter, place, PDL: tl.constexpr):
    """Move on by a frame: a kernel of its own, for all others of the frame read these positions."""
    wait(PDL)
    tl.store(counter, tl.load(counter) + 1)
    tl.store(place + 3, tl.load(place + 3) + 1)


class FrameGraphs:
    """A pool of a model's graphs: each concurrent generation has one of its own."""

    def __init__(self, model: DualARTransformer, head: nn.Module) -> None:
        """`head` gives row 0's logits: the end of speech, then every code."""
        self._model, self._head = model, head
        self._free: dict[int, list[FrameGraph]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def acquire(self, window: int) -> Iterator[FrameGraph]:
        """A graph nobody else uses, for a repetition penalty that looks back `window` frames."""
        size = triton.next_power_of_2(max(1, window))
        with self._lock:
            free = self._free.setdefault(size, [])
            graph = free.pop() if free else FrameGraph(self._model, self._head, size)
        try:
            yield graph
        finally:
            free.append(graph)


class FrameGraph:
    """Generates the frames of one speech at a time, with any KV cache of the model."""

    def __init__(self, model: DualARTransformer, head: nn.Module, window: int) -> None:
        """See `FrameGraphs`; `window`, a power of 2, bounds how far a penalty looks back."""
        c = self._config = model.config
        self._model, self._head, self._device = model, head, model.device
        self._window = window
        device, kind = model.device, {"device": model.device}
        self._x = torch.zeros(1, c.dim, **kind)
        self.hidden = self._x[0]  # [D], the hidden state that a frame is sampled from
        self._codes_x = torch.zeros(2, c.fast_dim, **kind)
        self._logits = torch.zeros(c.codebook_size + 1, **kind)
        self._generated = torch.zeros(c.max_seq_len, c.num_codebooks, dtype=torch.int64, **kind)
        self._uniforms = torch.ones(c.max_seq_len, c.num_codebooks, **kind)
        self._settings = torch.ones(4, **kind)
        self._counter = torch.zeros(1, dtype=torch.int64, **kind)
        self._fast_cache = model.new_fast_cache()
        self._fast_places = [
            place_of(self._fast_cache, position).to(device) for position in range(c.num_codebooks)
        ]
        rotary = model.rotary_table(c.max_seq_len, c.head_dim)
        fast_rotary = model.rotary_table(c.num_codebooks, c.fast_head_dim)
        self._slow = Stack(model.layers, rotary, columns=1)
        self._fast = Stack(model.fast_layers, fast_rotary, columns=2)
        scratch = model.new_cache(1)
        self._place = place_of(scratch, 0).to(device)
        self._replay = _capture(self._launch, device)

    def frames(
        self,
        cache: KeyValueCache,
        hidden: Tensor,
        count: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor | None]:
        """Codes [K] on the CPU of at most `count` frames; None at the end of speech.

        `hidden` [D] is that of the last column of `cache`, to which every frame's column is
        appended. When a frame is yielded, the next one is already being computed.
        """
        uniforms = torch.rand(
            count, self._config.num_codebooks, generator=generator, device=self._device
        )
        self._uniforms[:count] = 1 - uniforms
        penalty, top_p = sampling.repetition_penalty, sampling.top_p
        settings = (penalty, top_p, sampling.temperature, float(sampling.window))
        self._settings.copy_(torch.tensor(settings))
        self._place.copy_(place_of(cache, cache.length))
        self.hidden.copy_(hidden)
        self._counter.zero_()
        pending: list[Callable[[], Tensor]] = []
        for index in range(count + 1):
            if index < count:
                self._replay()
                pending.append(to_host_async(self._generated[index]))
            if index:
                frame = pending.pop(0)()
                if frame[0] == 0:
                    yield None
                    return
                frame[0] -= 1
                yield frame

    def _launch(self) -> None:
        c, model = self._config, self._model
        launch_head(self.hidden, self._head.norm, self._head.weight, self._logits)
        copies = isinstance(model.fast_project_in, nn.Identity)
        if not copies:
            self._codes_x[0] = model.fast_project_in(self.hidden.to(model.dtype))
        self._launch_sample(0, c.codebook_size + 1, copies)
        for row in range(1, c.num_codebooks):
            # The hidden state and the first code are known together: one pass takes both.
            columns = self._codes_x if row == 1 else self._codes_x[:1]
            place = self._fast_places[row + 1 - len(columns)]
            self._fast.launch(columns, place, few=c.num_codebooks)
            launch_head(columns[-1], model.fast_norm, model.fast_output.weight, self._logits)
            self._launch_sample(row, c.codebook_size)
        _embed[(1,)](
            self._generated, self._counter, model.embeddings.weight,
            model.codebook_embeddings.weight, self._x, model.semantic_begin_id,
            CODEBOOKS=c.num_codebooks, CODEBOOK_SIZE=c.codebook_size, D=c.dim,
            BLOCK=triton.next_power_of_2(c.dim),
            **launch_options(self._device, 4),
        )  # fmt: skip
        self._slow.launch(self._x, self._place)
        _advance_counter[(1,)](self._counter, self._place, **launch_options(self._device, 1))

    def _launch_sample(self, row: int, count: int, copies: bool = False) -> None:
        launch_sample(
            self._logits[:count], self._generated, self._uniforms, self._settings, self._counter,
            self._model.fast_embeddings.weight, self.hidden, self._codes_x, row=row,
            codebooks=self._config.num_codebooks, window=self._window, copies=copies,
        )  # fmt: skip


def launch_sample(
    logits: Tensor, *given: Tensor, row: int, codebooks: int, window: int, copies: bool = False
) -> None:
    """Launch `_sample`; `given` are its tensors from `generated` to `x`, in its order."""
    table = given[4]
    _sample[(1,)](
        logits, *given, row, table.shape[1], N=len(logits), FIRST=row == 0, COPIES=copies,
        CODEBOOKS=codebooks, BISECTION_STEPS=_BISECTION_STEPS, WINDOW=window,
        BLOCK=triton.next_power_of_2(len(logits)), BLOCK_D=triton.next_power_of_2(table.shape[1]),
        **launch_options(logits.device, _SAMPLE_WARPS),
    )  # fmt: skip


def _capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The launches captured as one graph; returns what replays it."""
    if device.type != "cuda":  # Triton's interpreter, in tests
        return launch
    with torch.cuda.device(device):
        launch()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Capture this thread only: others may be speaking.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    return graph.replay
