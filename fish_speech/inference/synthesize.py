"""Text to speech: text -> chunks -> prompts -> codes -> waveform, whole or while it is made."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fish_speech.conversation import Utterance
from fish_speech.devices import (
    has_native_bf16,
    resolve_device,
    resolve_precision,
    triton_unavailable_reason,
)
from fish_speech.hub import check_model_dir
from fish_speech.inference.context import Context
from fish_speech.inference.generate import (
    GenerationAttempt,
    PrefixCache,
    capture_frame_graphs,
    generate,
)
from fish_speech.inference.reference_encoder import ReferenceEncoder
from fish_speech.inference.sampling import Sampling
from fish_speech.inference.speakers import check_speaker, resolve_speaker
from fish_speech.inference.speech import Piece, Settings
from fish_speech.inference.streaming import decode_stream
from fish_speech.models.text2semantic import DualARTransformer, load_model
from fish_speech.models.text2semantic.decode.packed import pack
from fish_speech.models.vqgan import Codec, load_codec
from fish_speech.resources import is_out_of_memory
from fish_speech.text import is_speakable, max_speech_seconds, min_speech_seconds, split_text
from fish_speech.tokenizer import FishTokenizer

if TYPE_CHECKING:
    from fish_speech.inference.frame_graphs import FrameGraphs

logger = logging.getLogger(__name__)

# Seconds of silence between two chunks, by the mark that the first ends with.
_PAUSE_AFTER = dict.fromkeys(".!?…。！？．｡।؟።", 0.2) | dict.fromkeys(",;:—–，、；：،؛", 0.1)
_CLOSING_MARKS = "\"'”’»›)]}」』】》）"


class TextToSpeech:
    """A voice, built once and used as often as wanted, from several threads if need be.

    >>> tts = TextToSpeech.from_pretrained("checkpoints/tiny")          # doctest: +SKIP
    >>> waveform = tts.synthesize("Hello.", seed=1)                     # doctest: +SKIP
    >>> save_audio("hello.wav", waveform, tts.sample_rate)              # doctest: +SKIP
    """

    def __init__(
        self,
        model: DualARTransformer,
        codec: Codec,
        tokenizer: FishTokenizer,
        *,
        adaptable: bool = True,
        graphs: FrameGraphs | None = None,
    ) -> None:
        if codec.num_codebooks != model.config.num_codebooks:
            raise ValueError(
                f"the codec has {codec.num_codebooks} codebooks, the model"
                f" {model.config.num_codebooks}; use the codec that the model was trained with"
            )
        self._model, self._codec, self._tokenizer = model, codec, tokenizer
        self._graphs = graphs
        self._reference_encoder = ReferenceEncoder(codec, model.config)
        self._reference_cache: PrefixCache | None = None  # of the last text's references
        self._adaptable = adaptable
        self._lock = threading.Lock()  # of `_reference_cache`; the networks keep no state

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        compile: bool | None = None,
        adapt: Callable[[DualARTransformer], None] | None = None,
    ) -> TextToSpeech:
        """Load a model directory. `device` "auto" is CUDA where there is one, else the CPU.

        `dtype` None is bfloat16 on CUDA that has it, else float32; the codec is float32.
        `quantize` "int8" stores the weights of the language model's blocks in a byte each (CPU
        only; the others are then bfloat16 where `dtype` is None, and so is the codec's decoder
        where the CPU multiplies that natively): faster, about as exact as bfloat16. `compile` makes
        each frame one CUDA graph, compiled when first needed (some seconds) and kept: None does so
        on CUDA where it is possible, else it is logged as a warning. `adapt` is given the model
        as it was loaded, to change its weights (adapters must be merged into them). Raises
        `FileNotFoundError` or `ValueError` that says what is wrong.
        """
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize is {quantize!r}; 'int8' and None are known")
        check_model_dir(directory)
        device = resolve_device(str(device))
        if compile and (problem := triton_unavailable_reason(device)):
            raise ValueError(f"compile=True: frames can't be compiled: {problem}")
        if device.type == "cpu":
            from fish_speech.inference import cpu_sampling  # noqa: F401 (compiled now, not while it speaks)
        default = torch.bfloat16 if quantize else resolve_precision("auto", device)
        model = load_model(directory, device, dtype or default)
        if adapt is not None:
            adapt(model)
        model = pack(model, quantize)
        tokenizer = FishTokenizer.from_pretrained(directory)
        wanted = compile or (compile is None and device.type == "cuda")
        graphs = (
            _try_capture_frame_graphs(model, tokenizer, required=bool(compile)) if wanted else None
        )
        bf16_codec = quantize is not None and has_native_bf16(device)
        codec = load_codec(directory, device, torch.bfloat16 if bf16_codec else torch.float32)
        return cls(model, codec, tokenizer, adaptable=False, graphs=graphs)

    @property
    def model(self) -> DualARTransformer:
        return self._model

    @property
    def compiled(self) -> bool:
        """Whether each frame is one CUDA graph."""
        return self._graphs is not None

    @property
    def speakers(self) -> list[str]:
        """The names that `speaker` may have; empty where the model lists none."""
        return self._model.config.extra.get("speakers", [])

    def forget_speakers(self) -> None:
        """Take any name, or none, for the voice: it will be of adapters to this model."""
        self._model.config.extra.pop("speakers", None)

    @property
    def sample_rate(self) -> int:
        """Hz of every waveform."""
        return self._codec.sample_rate

    def encode_reference(self, audio: str | Path, text: str) -> Utterance:
        """A recording and its words, as a voice for `reference`; encoded once for the same content.

        Raises `FileNotFoundError`, or `ValueError` where the file is no audio, silent, or too long
        for the model, or the text has no words. A recording that its text can't fill, or longer
        than what the model was trained on, is logged as a warning.
        """
        return self._reference_encoder.encode(audio, text)

    def synthesize(
        self,
        text: str,
        *,
        reference: Utterance | Sequence[Utterance] | None = None,
        speaker: str | None = None,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int = Settings.seed,
        max_new_tokens: int | None = None,
        retries: int = Settings.retries,
    ) -> Tensor:
        """Speak a text of any length: waveform [1, N], float32 on the CPU, at `sample_rate`.

        `reference` is what `encode_reference` returns (one or several), `speaker` one of `speakers`
        where the model has several (the first, where nobody is cloned). Problems that leave a
        speech all the same (see `Settings`) are logged as warnings. Raises `ValueError` where
        `check` does, or for a model that says nothing at all.
        """
        sampling = Sampling(temperature, top_p, repetition_penalty)
        settings = Settings(sampling, seed, max_new_tokens, retries)
        waveforms = _log_problems(self.pieces(text, reference, speaker, settings))
        return torch.cat(list(waveforms), dim=1)

    def stream(
        self,
        text: str,
        *,
        reference: Utterance | Sequence[Utterance] | None = None,
        speaker: str | None = None,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int = Settings.seed,
        max_new_tokens: int | None = None,
        retries: int = 0,
    ) -> Iterator[Tensor]:
        """Like `synthesize`, but yields waveforms [1, n], n above 0, while they are made.

        What has been heard can't be taken back: with `retries` above 0 a chunk is held until it is
        known to be good. Where nothing needs a second try, the pieces are those of `synthesize`.
        """
        sampling = Sampling(temperature, top_p, repetition_penalty)
        settings = Settings(sampling, seed, max_new_tokens, retries)
        return _log_problems(self.pieces(text, reference, speaker, settings))

    def check(
        self,
        text: str,
        reference: Utterance | Sequence[Utterance] | None = None,
        speaker: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Raise `ValueError` for what can't be spoken, before anything of it is.

        That is a text without words, a speaker that the model does not have, and a reference or a
        stretch of the text that can't be cut for which the model's context has no room.
        """
        self._plan(text, reference, speaker, settings or Settings())

    def pieces(
        self,
        text: str,
        reference: Utterance | Sequence[Utterance] | None = None,
        speaker: str | None = None,
        settings: Settings | None = None,
    ) -> Iterator[Piece]:
        """What `synthesize` and `stream` are made of: the speech with its progress and problems."""
        settings = settings or Settings()
        return self._pieces(*self._plan(text, reference, speaker, settings), settings)

    def _pieces(self, chunks: list[str], context: Context, settings: Settings) -> Iterator[Piece]:
        prefix_cache, spoken_frames = self._prefill(context.reference_prefix()), 0
        for index, text in enumerate(chunks):
            if not is_speakable(text):
                problem = f"{_chunk_name(text, index, len(chunks))}: left out, it has no words"
                yield Piece(
                    torch.zeros(1, 0), index, len(chunks), 0, ends_chunk=True, problem=problem
                )
                continue
            limit, expected = self._frame_counts(text, settings)
            prompt, room = context.prompt(text, expected)
            chunk = _Chunk(text, index, len(chunks), prompt, min(limit, room), prefix_cache)
            codes, problem = yield from self._speak(chunk, settings)
            spoken_frames += codes.shape[1]
            if problem is None:  # a chunk that went wrong would spoil the next
                context.add(Utterance(text, codes))
        if not spoken_frames:
            raise ValueError("the model said nothing; try another seed, or train it further")

    def _prefill(self, reference_prefix: Tensor | None) -> PrefixCache:
        """A prefix cache that holds the references' positions [K+1, T], if there are any.

        It is kept for the next text, which saves that work in a batch. References are always
        prefilled by themselves, so that a seed gives the same speech with a kept cache as without.
        """
        if reference_prefix is None:
            return PrefixCache(self._model)
        with self._lock:
            cache = self._reference_cache
            if cache is None or not cache.matches(reference_prefix):
                cache = PrefixCache(self._model)
                cache.prefill(reference_prefix)
                # Not kept where adapters may be exchanged: they change the keys and values.
                self._reference_cache = None if self._adaptable else cache
            return cache.copy()

    def _plan(
        self,
        text: str,
        reference: Utterance | Sequence[Utterance] | None,
        speaker: str | None,
        settings: Settings,
    ) -> tuple[list[str], Context]:
        """The chunks of a text, each of which has room in the model's context."""
        check_speaker(speaker, self.speakers)
        references = [reference] if isinstance(reference, Utterance) else list(reference or ())
        speaker = resolve_speaker(speaker, self.speakers, cloned=bool(references))
        chunks = split_text(text)
        if not any(map(is_speakable, chunks)):
            raise ValueError(f"there is nothing to speak in {text[:40]!r}: no letter and no number")
        context = Context(
            self._tokenizer,
            self._model.config,
            frame_rate=self._codec.frame_rate,
            references=references,
            speaker=speaker,
            max_tokens=settings.context_tokens,
        )
        for chunk in filter(is_speakable, chunks):
            context.min_prompt_length(chunk, self._frame_counts(chunk, settings)[1])
        return chunks, context

    def _frame_counts(self, text: str, settings: Settings) -> tuple[int, int]:
        """The most frames that a chunk may have, and how many are to be expected."""
        longest = ceil(max_speech_seconds(text) * self._codec.frame_rate)
        limit = settings.max_new_tokens or longest
        return limit, min(limit, longest // 2)

    def _speak(
        self, chunk: _Chunk, settings: Settings
    ) -> Generator[Piece, None, tuple[Tensor, str | None]]:
        """Yield the pieces of one chunk; return its codes [K, T] and its problem, if any.

        Only the last try is decoded while it is generated: the others may have to be thrown away.
        """
        for tries in range(1, settings.retries + 2):
            attempt = GenerationAttempt(
                generate(
                    self._model,
                    chunk.prompt,
                    im_end_id=self._tokenizer.im_end_id,
                    max_new_tokens=chunk.limit,
                    sampling=settings.sampling,
                    generator=_generator(self._model.device, settings.seed, chunk.index, tries),
                    prefix_cache=chunk.prefix_cache,
                    graphs=self._graphs,
                )
            )
            last_try = tries > settings.retries
            if not last_try:
                attempt.finish()
            if last_try or self._problem(chunk, attempt, tries) is None:
                break
        for waveform, frames in decode_stream(self._codec, attempt):
            yield Piece(waveform, chunk.index, chunk.count, frames)
        problem = self._problem(chunk, attempt, tries)
        seconds = 0.0 if chunk.index + 1 == chunk.count else _pause_after(chunk.text)
        pause = torch.zeros(1, round(seconds * self.sample_rate))
        state = {"ran_on": not attempt.ended, "lost": not attempt.frames}
        yield Piece(pause, chunk.index, chunk.count, 0, True, problem, **state)
        return attempt.codes(self._codec.num_codebooks), problem

    def _problem(self, chunk: _Chunk, attempt: GenerationAttempt, tries: int) -> str | None:
        """What is wrong with a finished attempt, as a message to the user; None if nothing is."""
        seconds = len(attempt.frames) / self._codec.frame_rate
        if not attempt.frames:
            what = "the model said nothing"
        elif not attempt.ended:
            what = f"the speech did not end in {seconds:.1f} s and was cut there"
        elif seconds < min_speech_seconds(chunk.text):
            what = f"the speech broke off after {seconds:.1f} s"
        else:
            return None
        after = f", after {tries} tries" if tries > 1 else ""
        return f"{_chunk_name(chunk.text, chunk.index, chunk.count)}: {what}{after}"


def _try_capture_frame_graphs(
    model: DualARTransformer, tokenizer: FishTokenizer, required: bool
) -> FrameGraphs | None:
    """The model's frame graphs; None, with a warning, if that fails and is not `required`."""
    problem = triton_unavailable_reason(model.device)
    try:
        if problem is None:
            return capture_frame_graphs(model, tokenizer.im_end_id)
    except Exception as error:  # Triton fails on this card
        if required or is_out_of_memory(error):
            raise
        problem = " ".join(str(error).split()) or type(error).__name__
    logger.warning(f"frames can't be compiled, so speaking takes many times as long: {problem}")
    return None


@dataclass(frozen=True)
class _Chunk:
    """Chunk `index` of `count`, its `prompt [K+1, T]`, and the `limit` of its frames."""

    text: str
    index: int
    count: int
    prompt: Tensor
    limit: int
    prefix_cache: PrefixCache


def _log_problems(pieces: Iterable[Piece]) -> Iterator[Tensor]:
    for piece in pieces:
        if piece.problem:
            logger.warning(piece.problem)
        if piece.waveform.shape[1]:
            yield piece.waveform


def _generator(device: torch.device, seed: int, chunk: int, tries: int) -> torch.Generator:
    """The random numbers of one try: independent of the others, and of how the output is cut."""
    digest = hashlib.sha256(f"{seed} {chunk} {tries}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def _chunk_name(text: str, index: int, count: int) -> str:
    """A chunk as a message names it."""
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return f"chunk {index + 1} of {count} ({shown!r})"


def _pause_after(text: str) -> float:
    return _PAUSE_AFTER.get(text.rstrip(_CLOSING_MARKS)[-1:], 0.0)
