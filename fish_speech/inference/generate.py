"""A prompt's continuation, frame by frame. Knows tensors only: no text, no audio."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fish_speech.inference.sampling import Sampling, sample
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.lora import effective_weight_rows, lora_modules

if TYPE_CHECKING:
    from fish_speech.inference.frame_graphs import FrameGraphs


class Past:
    """The columns that a model has read and made, with their keys and values.

    A prompt that begins like them goes on from there: the chunks of a text, and further tries of a
    chunk, differ at their ends only. Serves one continuation at a time.
    """

    def __init__(self, model: DualARTransformer) -> None:
        self._model = model
        self.cache = model.new_cache(0)
        self._columns = torch.zeros(model.config.num_codebooks + 1, 0, dtype=torch.long)
        self._made: list[Tensor] = []  # [K+1] each, behind those

    @torch.inference_mode()
    def read(self, prompt: Tensor, room: int = 0) -> Tensor:
        """Hidden state [D] of the last column of prompt [K+1, T]; `room` columns may follow it."""
        known = min(self._alike(prompt), prompt.shape[1] - 1)
        if self.cache.size < prompt.shape[1] + room:
            before = self.cache
            self.cache = self._model.new_cache(prompt.shape[1] + room)
            self.cache.copy_prefix(before, known)
        self.cache.length = known
        self._columns, self._made = prompt, []
        rest = prompt[None, :, known:].to(self._model.device)
        return self._model.hidden_states(rest, cache=self.cache)[0, -1]

    def make(self, column: Tensor) -> Tensor:
        """Hidden state [D] of one more column [K+1], on the model's device."""
        self._made.append(column)
        return self._model.hidden_states(column[None, :, None], cache=self.cache)[0, -1]

    def add(self, column: Tensor) -> None:
        """Count one more column [K+1] that was written into the cache."""
        self._made.append(column)
        self.cache.length += 1

    def holds(self, prompt: Tensor) -> bool:
        """Whether it is of this prompt [K+1, T] and nothing else."""
        return torch.equal(self._columns, prompt) and not self._made

    @torch.inference_mode()
    def copy(self) -> Past:
        past = Past(self._model)
        past.cache = self._model.new_cache(self.cache.length)
        past.cache.copy_prefix(self.cache, self.cache.length)
        past._columns, past._made = self._columns, list(self._made)
        return past

    def _alike(self, prompt: Tensor) -> int:
        """With how many of its columns a prompt [K+1, T] begins."""
        mine = self._columns
        if self._made:
            mine = torch.cat([mine, torch.stack(self._made, dim=1).cpu()], dim=1)
        size = min(mine.shape[1], prompt.shape[1])
        same = (mine[:, :size] == prompt[:, :size]).all(0)
        return int(same.long().cumprod(0).sum())


@torch.inference_mode()
def generate(
    model: DualARTransformer,
    prompt: Tensor,
    *,
    im_end_id: int,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    past: Past | None = None,
    graphs: FrameGraphs | None = None,
) -> Generator[Tensor, None, bool]:
    """Continue prompt [K+1, T] (int64, on the CPU). Yields the codes [K] of one frame at a time.

    The return value is True where the model ended its speech with `<|im_end|>`, False where
    `max_new_tokens` or the context cut it. Raises `ValueError` where the prompt leaves no room.
    `generator` must live on the model's device. What `past` holds of the prompt isn't read again.
    `graphs` are those of the model, with which a GPU makes frames many times faster.
    """
    context = model.config.max_seq_len
    room = context - prompt.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens, but the model's context is {context}; "
            "use a shorter text or reference"
        )
    frames = min(max_new_tokens, room)
    past = past or Past(model)
    hidden = past.read(prompt, frames)
    if graphs is None:
        made = _FrameDecoder(model, im_end_id, sampling, generator).frames(past, hidden, frames)
    else:
        made = _by_graph(model, graphs, past, hidden, frames, sampling, generator)
    for codes in made:
        if codes is None:
            return True
        yield codes
    return False


def _by_graph(
    model: DualARTransformer,
    graphs: FrameGraphs,
    past: Past,
    hidden: Tensor,
    frames: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor | None]:
    """As `_FrameDecoder.frames`, on the CPU: each frame while the next is being made."""
    with graphs.one(sampling.window) as graph:
        for codes in graph.frames(past.cache, hidden, frames, sampling, generator):
            if codes is not None:
                past.add(_column(model, codes))
            yield codes


def _column(model: DualARTransformer, codes: Tensor) -> Tensor:
    """A frame's codes [K] as the slow transformer reads them [K+1]."""
    return torch.cat([codes[:1] + model.semantic_begin_id, codes])


def row_0_head(model: DualARTransformer, im_end_id: int) -> nn.Module:
    """Row 0's logits, [D] -> [1 + C]: only `<|im_end|>` or a semantic token may be drawn there, so
    only those rows of the output layer are ever computed."""
    begin = model.semantic_begin_id
    rows = torch.arange(begin - 1, begin + model.config.codebook_size, device=model.device)
    rows[0] = im_end_id
    return model.head_type(model.norm, effective_weight_rows(model.output_layer, rows))


@torch.inference_mode()
def graphs_of(model: DualARTransformer, im_end_id: int) -> FrameGraphs:
    """What makes every frame one CUDA graph, compiled here (see `devices.compile_problem`).

    The model may not be changed any more. Raises `ValueError` where it has adapters.
    """
    from fish_speech.inference.frame_graphs import FrameGraphs

    if any(lora_modules(model)):
        raise ValueError("a graph knows no adapters: merge them first (`merge_lora`)")

    graphs = FrameGraphs(model, row_0_head(model, im_end_id))
    with graphs.one(Sampling.window):
        return graphs


class Take:
    """One try at a continuation: frames [K] as they are made, all of them again if asked again."""

    def __init__(self, source: Generator[Tensor, None, bool]) -> None:
        self._source = source
        self._finished = False
        self.frames: list[Tensor] = []
        self.ended = False  # by the model, not by the limit

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.frames
        while not self._finished:
            try:
                self.frames.append(next(self._source))
            except StopIteration as stop:
                self._finished, self.ended = True, stop.value
            else:
                yield self.frames[-1]

    def finish(self) -> None:
        """Make all frames."""
        for _ in self:
            pass

    def codes(self, num_codebooks: int) -> Tensor:
        """All frames as [K, T] on the CPU."""
        if not self.frames:
            return torch.zeros(num_codebooks, 0, dtype=torch.long)
        return torch.stack(self.frames, dim=1).cpu()


class _FrameDecoder:
    """Samples the frame that follows a hidden state of the slow transformer."""

    def __init__(
        self,
        model: DualARTransformer,
        im_end_id: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.sampling, self.generator = model, sampling, generator
        self.head = row_0_head(model, im_end_id)
        self.cache = model.new_fast_cache()
        # Of the last frames: row 0's sampled row, then the codes. None before the first frame,
        # which the reference never remembers; its penalty, and so its speech, depends on that.
        self.history: list[Tensor] | None = None

    def frames(self, past: Past, hidden: Tensor, count: int) -> Iterator[Tensor | None]:
        """Codes [K] of at most `count` frames behind a hidden state [D]; None at the end."""
        for made in range(1, count + 1):
            codes = self.decode(hidden)
            yield codes
            if codes is None:
                return
            if made < count:
                hidden = past.make(_column(self.model, codes))

    def decode(self, hidden: Tensor) -> Tensor | None:
        """hidden [D] -> codes [K] (int64), or None at the end of speech."""
        model = self.model
        window = torch.stack(self.history, dim=1) if self.history else None  # [K+1, n]
        row = self._sample(self.head(hidden), window, 0)
        if row == 0:
            return None
        codes = [row - 1]
        # The hidden state and the first code are known together: one pass takes both.
        x = torch.stack([model.fast_project_in(hidden), model.fast_embeddings(codes[0])])[None]
        self.cache.length = 0
        for k in range(1, model.config.num_codebooks):
            logits = model.fast_logits(x, self.cache)[0, -1]
            codes.append(self._sample(logits, window, k + 1))
            x = model.fast_embeddings(codes[-1])[None, None]
        frame = torch.stack(codes)
        if self.history is None:
            self.history = []
        else:
            column, window = torch.cat([row[None], frame]), self.sampling.window
            self.history = [*self.history, column][-window:] if window else []
        return frame

    def _sample(self, logits: Tensor, window: Tensor | None, row: int) -> Tensor:
        previous = window[row] if window is not None else None
        return sample(logits, previous, self.sampling, self.generator)
