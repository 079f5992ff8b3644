"""A frame as one CUDA graph: some 270 kernels of a few microseconds, which the program launches as
one. Imported only where it is needed: Triton is there on Linux, and needs a C compiler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fish_speech.devices import read_later
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
from fish_speech.models.text2semantic.llama import KeyValueCache

_HALVINGS = 24  # of the distance to a threshold
_DRAW_WARPS = 4


@triton.jit(do_not_specialize=["ROW"])
def _draw(
    logits, made, numbers, settings, counter, table, hidden, x, ROW, D, N: tl.constexpr,
    FIRST: tl.constexpr, COPIES: tl.constexpr, CODEBOOKS: tl.constexpr, HALVINGS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw a code from logits [N] as `draw.draw` does, into made [frames, K], and look up what the
    fast transformer reads next: its row of `table`, into the last column of x."""
    begin(PDL)
    v, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    frame = tl.load(counter)
    penalty, top_p, temperature = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    window = tl.load(settings + 3).to(tl.int32)
    number = tl.load(numbers + frame * CODEBOOKS + ROW)
    repeats = v < 0
    for back in tl.static_range(1, WINDOW + 1):
        seen = (back <= window) & (frame > back)  # never the first frame
        code = tl.load(made + (frame - back) * CODEBOOKS + ROW, mask=seen, other=-1)
        repeats = repeats | (v == code)
    wait(PDL)
    scores = tl.load(logits + v, mask=v < N, other=-float("inf"))
    changed = tl.where(scores < 0, scores * penalty, scores / penalty)
    scores = tl.where(repeats, changed, scores)
    largest = tl.max(scores, 0)
    weights = tl.exp(scores - largest)
    # The least weight that stays: of those from it on, the sum is within top-p.
    most, least, below = top_p * tl.sum(weights, 0), 1.0, 0.0
    for _ in range(HALVINGS):
        middle = (least + below) * 0.5
        fits = tl.sum(tl.where(weights >= middle, weights, 0.0), 0) <= most
        least, below = tl.where(fits, middle, least), tl.where(fits, below, middle)
    stays = (v < N) & (weights >= tl.where(top_p < 1, least, 0.0))
    weights = tl.where(stays, tl.exp((scores - largest) / tl.maximum(temperature, 1e-5)), 0.0)
    passed = tl.cumsum(weights, 0)
    reached = (passed >= number * tl.sum(weights, 0)) & (weights > 0)
    drawn = tl.min(tl.where(reached, v, BLOCK), 0)
    last = tl.max(tl.where(weights > 0, v, 0), 0)
    drawn = tl.where(temperature > 0, tl.minimum(drawn, last), tl.argmax(scores, 0))
    tl.store(made + frame * CODEBOOKS + ROW, drawn.to(tl.int64))
    if FIRST:
        code = tl.maximum(drawn - 1, 0)  # row 0 is the end of speech
        if COPIES:
            tl.store(x + d, tl.load(hidden + d, mask=d < D, other=0.0), mask=d < D)
        to = x + D + d
    else:
        code, to = drawn, x + d
    row = tl.load(table + code * D + d, mask=d < D, other=0.0)
    tl.store(to, row.to(tl.float32), mask=d < D)


@triton.jit
def _embed(
    made, counter, text, codes, x, first_id, CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The frame as the slow transformer's next column x [D]."""
    begin(PDL)
    d = tl.arange(0, BLOCK)
    frame_codes = made + tl.load(counter) * CODEBOOKS
    wait(PDL)
    code = tl.maximum(tl.load(frame_codes) - 1, 0)
    total = tl.load(text + (first_id + code) * D + d, mask=d < D, other=0.0).to(tl.float32)
    total += tl.load(codes + code * D + d, mask=d < D, other=0.0).to(tl.float32)
    for book in tl.static_range(1, CODEBOOKS):
        row = tl.load(frame_codes + book) + book * CODEBOOK_SIZE
        total += tl.load(codes + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(x + d, total, mask=d < D)


@triton.jit
def _count(counter, place, PDL: tl.constexpr):
    """At the end of a frame, so that in it nothing changes where it is."""
    wait(PDL)
    tl.store(counter, tl.load(counter) + 1)
    tl.store(place + 3, tl.load(place + 3) + 1)


class FrameGraphs:
    """As many graphs of a model as speeches are made at a time; each makes one after the other."""

    def __init__(self, model: DualARTransformer, head: nn.Module) -> None:
        """`head` gives row 0's logits: the end of speech, then every code."""
        self._model, self._head = model, head
        self._free: dict[int, list[FrameGraph]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def one(self, window: int) -> Iterator[FrameGraph]:
        """One that nobody else uses, for a repetition penalty that looks back so many frames."""
        size = triton.next_power_of_2(max(1, window))
        with self._lock:
            free = self._free.setdefault(size, [])
            graph = free.pop() if free else FrameGraph(self._model, self._head, size)
        try:
            yield graph
        finally:
            free.append(graph)


class FrameGraph:
    """Makes the frames of one speech at a time, from whatever cache it is given."""

    def __init__(self, model: DualARTransformer, head: nn.Module, window: int) -> None:
        """See `FrameGraphs`; `window`, a power of 2, is the most that a penalty looks back."""
        c = self._config = model.config
        self._model, self._head, self._device = model, head, model.device
        self._window = window
        device, kind = model.device, {"device": model.device}
        self._x = torch.zeros(1, c.dim, **kind)
        self.hidden = self._x[0]  # [D], what a frame is made of
        self._codes_x = torch.zeros(2, c.fast_dim, **kind)
        self._logits = torch.zeros(c.codebook_size + 1, **kind)
        self._made = torch.zeros(c.max_seq_len, c.num_codebooks, dtype=torch.int64, **kind)
        self._numbers = torch.ones(c.max_seq_len, c.num_codebooks, **kind)
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
        self._play = _captured(self._launch, device)

    def frames(
        self,
        cache: KeyValueCache,
        hidden: Tensor,
        count: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor | None]:
        """Codes [K] on the CPU of at most `count` frames; None at the end of speech.

        `hidden` [D] is the hidden state of the last column of `cache`, behind which every frame's
        column is written. The next frame is already being made when one is given.
        """
        numbers = torch.rand(
            count, self._config.num_codebooks, generator=generator, device=self._device
        )
        self._numbers[:count] = 1 - numbers
        penalty, top_p = sampling.repetition_penalty, sampling.top_p
        settings = (penalty, top_p, sampling.temperature, float(sampling.window))
        self._settings.copy_(torch.tensor(settings))
        self._place.copy_(place_of(cache, cache.length))
        self.hidden.copy_(hidden)
        self._counter.zero_()
        coming: list[Callable[[], Tensor]] = []
        for index in range(count + 1):
            if index < count:
                self._play()
                coming.append(read_later(self._made[index]))
            if index:
                frame = coming.pop(0)()
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
        self._launch_draw(0, c.codebook_size + 1, copies)
        for row in range(1, c.num_codebooks):
            # The hidden state and the first code are known together: one pass takes both.
            columns = self._codes_x if row == 1 else self._codes_x[:1]
            place = self._fast_places[row + 1 - len(columns)]
            self._fast.launch(columns, place, few=c.num_codebooks)
            launch_head(columns[-1], model.fast_norm, model.fast_output.weight, self._logits)
            self._launch_draw(row, c.codebook_size)
        _embed[(1,)](
            self._made, self._counter, model.embeddings.weight, model.codebook_embeddings.weight,
            self._x, model.semantic_begin_id, CODEBOOKS=c.num_codebooks,
            CODEBOOK_SIZE=c.codebook_size, D=c.dim, BLOCK=triton.next_power_of_2(c.dim),
            **launch_options(self._device, 4),
        )  # fmt: skip
        self._slow.launch(self._x, self._place)
        _count[(1,)](self._counter, self._place, **launch_options(self._device, 1))

    def _launch_draw(self, row: int, count: int, copies: bool = False) -> None:
        launch_draw(
            self._logits[:count], self._made, self._numbers, self._settings, self._counter,
            self._model.fast_embeddings.weight, self.hidden, self._codes_x, row=row,
            codebooks=self._config.num_codebooks, window=self._window, copies=copies,
        )  # fmt: skip


def launch_draw(
    logits: Tensor, *given: Tensor, row: int, codebooks: int, window: int, copies: bool = False
) -> None:
    """Launch `_draw`, whose other tensors are given as it names them."""
    table = given[4]
    _draw[(1,)](
        logits, *given, row, table.shape[1], N=len(logits), FIRST=row == 0, COPIES=copies,
        CODEBOOKS=codebooks, HALVINGS=_HALVINGS, WINDOW=window,
        BLOCK=triton.next_power_of_2(len(logits)), BLOCK_D=triton.next_power_of_2(table.shape[1]),
        **launch_options(logits.device, _DRAW_WARPS),
    )  # fmt: skip


def _captured(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The launches as a graph, which is asked for at once."""
    if device.type != "cuda":  # Triton's interpreter, in tests
        return launch
    with torch.cuda.device(device):
        launch()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: others may be speaking.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    return graph.replay
