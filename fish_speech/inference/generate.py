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

_DAMAGED = (
    "the model computes values that are no numbers: its weights are damaged; get it, or merge it,"
    " again"
)


class PrefixCache:
    """KV cache of the positions seen so far. A new prompt that shares a prefix reuses it.

    The chunks of a text, and the retries of a chunk, differ only at their ends. One generation at a
    time.
    """

    def __init__(self, model: DualARTransformer) -> None:
        self._model = model
        self.cache = model.new_cache(0)
        self._columns = torch.zeros(model.config.num_codebooks + 1, 0, dtype=torch.long)
        self._generated: list[Tensor] = []  # [K+1] each, after those

    @torch.inference_mode()
    def prefill(self, prompt: Tensor, room: int = 0) -> Tensor:
        """Hidden state [D] of the last column of prompt [K+1, T]; `room` columns may follow it."""
        known = min(self._common_prefix_length(prompt), prompt.shape[1] - 1)
        if self.cache.size < prompt.shape[1] + room:
            before = self.cache
            self.cache = self._model.new_cache(prompt.shape[1] + room)
            self.cache.copy_prefix(before, known)
        self.cache.length = known
        self._columns, self._generated = prompt, []
        rest = prompt[None, :, known:].to(self._model.device)
        return self._model.hidden_states(rest, cache=self.cache)[0, -1]

    def decode_step(self, column: Tensor) -> Tensor:
        """Hidden state [D] of one more column [K+1], on the model's device."""
        self._generated.append(column)
        return self._model.hidden_states(column[None, :, None], cache=self.cache)[0, -1]

    def advance(self, column: Tensor) -> None:
        """Count one more column [K+1] whose keys and values are already in the cache."""
        self._generated.append(column)
        self.cache.length += 1

    def matches(self, prompt: Tensor) -> bool:
        """Whether it holds exactly this prompt [K+1, T]."""
        return torch.equal(self._columns, prompt) and not self._generated

    @torch.inference_mode()
    def copy(self) -> PrefixCache:
        copy = PrefixCache(self._model)
        copy.cache = self._model.new_cache(self.cache.length)
        copy.cache.copy_prefix(self.cache, self.cache.length)
        copy._columns, copy._generated = self._columns, list(self._generated)
        return copy

    def _common_prefix_length(self, prompt: Tensor) -> int:
        """How many leading columns a prompt [K+1, T] shares with the cached ones."""
        cached = self._columns
        if self._generated:
            cached = torch.cat([cached, torch.stack(self._generated, dim=1).cpu()], dim=1)
        size = min(cached.shape[1], prompt.shape[1])
        same = (cached[:, :size] == prompt[:, :size]).all(0)
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
    prefix_cache: PrefixCache | None = None,
    graphs: FrameGraphs | None = None,
) -> Generator[Tensor, None, bool]:
    """Continue prompt [K+1, T] (int64, on the CPU). Yields the codes [K] of one frame at a time.

    The return value is True where the model ended its speech with `<|im_end|>`, False where
    `max_new_tokens` or the context cut it. Raises `ValueError` where the prompt leaves no room, or
    damaged weights give no numbers.
    `generator` must live on the model's device. What `prefix_cache` holds of the prompt is not
    computed again. `graphs` are those of the model; with them a GPU is many times faster.
    """
    context = model.config.max_seq_len
    room = context - prompt.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens, but the model's context is {context}; "
            "use a shorter text or reference"
        )
    frames = min(max_new_tokens, room)
    prefix_cache = prefix_cache or PrefixCache(model)
    hidden = prefix_cache.prefill(prompt, frames)
    _check_finite(model, hidden)
    if graphs is None:
        decoder = _FrameDecoder(model, im_end_id, sampling, generator)
        generated = decoder.frames(prefix_cache, hidden, frames)
    else:
        generated = _generate_with_graphs(
            model, graphs, prefix_cache, hidden, frames, sampling, generator
        )
    for codes in generated:
        if codes is None:
            return True
        yield codes
    return False


def _check_finite(model: DualARTransformer, hidden: Tensor) -> None:
    """Raise `ValueError` where a hidden state [D], or the fast transformer's logits of it, are no
    numbers. (Once a prompt: looking at each frame would have to wait for the device.)"""
    x = model.fast_project_in(hidden)[None, None]
    logits = model.fast_logits(x, model.new_fast_cache())
    if not (hidden.isfinite().all() & logits.isfinite().all()):
        raise ValueError(_DAMAGED)


def _generate_with_graphs(
    model: DualARTransformer,
    graphs: FrameGraphs,
    prefix_cache: PrefixCache,
    hidden: Tensor,
    frames: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor | None]:
    """Like `_FrameDecoder.frames`, on the CPU; a frame is yielded while the next is computed."""
    with graphs.acquire(sampling.window) as graph:
        for codes in graph.frames(prefix_cache.cache, hidden, frames, sampling, generator):
            if codes is not None:
                prefix_cache.advance(_column(model, codes))
            yield codes


def _column(model: DualARTransformer, codes: Tensor) -> Tensor:
    """A frame's codes [K] as the slow transformer reads them [K+1]."""
    return torch.cat([codes[:1] + model.semantic_begin_id, codes])


def semantic_head(model: DualARTransformer, im_end_id: int) -> nn.Module:
    """Logits of row 0, [D] -> [1 + C]: `<|im_end|>`, then the semantic tokens.

    Nothing else may be sampled there, so the other rows of the output layer are never computed.
    Raises `ValueError` where it would give no numbers: a sample of them is noise, or silence.
    """
    begin = model.semantic_begin_id
    rows = torch.arange(begin - 1, begin + model.config.codebook_size, device=model.device)
    rows[0] = im_end_id
    weight = effective_weight_rows(model.output_layer, rows)
    sums = [values.sum(dtype=torch.float32) for values in (weight, model.norm.weight)]
    if not sum(sums).isfinite():  # much faster than to look at each
        raise ValueError(_DAMAGED)
    return model.head_type(model.norm, weight)


@torch.inference_mode()
def capture_frame_graphs(model: DualARTransformer, im_end_id: int) -> FrameGraphs:
    """Compile the model's frames to CUDA graphs (see `devices.triton_unavailable_reason`).

    The model may not be changed any more. Raises `ValueError` where it has adapters.
    """
    from fish_speech.inference.frame_graphs import FrameGraphs

    if any(lora_modules(model)):
        raise ValueError("a graph knows no adapters: merge them first (`merge_lora`)")

    graphs = FrameGraphs(model, semantic_head(model, im_end_id))
    with graphs.acquire(Sampling.window):
        return graphs


class GenerationAttempt:
    """One run of `generate`: iterates over its frames [K], as often as wanted."""

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
        """Generate all frames."""
        for _ in self:
            pass

    def codes(self, num_codebooks: int) -> Tensor:
        """All frames as [K, T] on the CPU."""
        if not self.frames:
            return torch.zeros(num_codebooks, 0, dtype=torch.long)
        return torch.stack(self.frames, dim=1).cpu()


class _FrameDecoder:
    """Samples the frame that follows a hidden state of the slow transformer, without graphs."""

    def __init__(
        self,
        model: DualARTransformer,
        im_end_id: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.sampling, self.generator = model, sampling, generator
        self.head = semantic_head(model, im_end_id)
        self.cache = model.new_fast_cache()
        # [K+1] of each of the last frames: the index sampled from row 0's logits, then the codes.
        # None before the first frame, which the reference implementation leaves out of its
        # repetition penalty; its speech depends on that.
        self.history: list[Tensor] | None = None

    def frames(
        self, prefix_cache: PrefixCache, hidden: Tensor, count: int
    ) -> Iterator[Tensor | None]:
        """Codes [K] of at most `count` frames after a hidden state [D]; None at the end."""
        for step in range(1, count + 1):
            codes = self.decode(hidden)
            yield codes
            if codes is None:
                return
            if step < count:
                hidden = prefix_cache.decode_step(_column(self.model, codes))

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
