"""The utterances in a prompt before its text: references and chunks already spoken."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fish_speech.conversation import Utterance, build_prefix, build_prompt
from fish_speech.models.text2semantic import ModelConfig
from fish_speech.tokenizer import FishTokenizer


class Context:
    """The utterances that come before the next chunk, as many as there is room for.

    The references and the first chunk stay: they keep the voice from drifting. When the room is
    used up, the oldest of the others are dropped until half of it is free or only the newest is
    left. Dropping many at once matters: it invalidates the KV cache of all that comes after them.
    `max_tokens` is the room for chunks already spoken, `frame_rate` the codec's.
    """

    def __init__(
        self,
        tokenizer: FishTokenizer,
        config: ModelConfig,
        *,
        frame_rate: float,
        references: Sequence[Utterance] = (),
        speaker: str | None = None,
        max_tokens: int = 1024,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._frame_rate, self._speaker, self._max_tokens = frame_rate, speaker, max_tokens
        self._references = list(references)
        self._spoken: list[Utterance] = []

    def add(self, utterance: Utterance) -> None:
        """Remember a chunk that was spoken."""
        self._spoken.append(utterance)

    def min_prompt_length(self, text: str, expected_frames: int) -> int:
        """Tokens of the prompt for `text` without any chunk already spoken.

        Raises `ValueError` where the model's context has no room for `expected_frames` more.
        """
        length = self._build(text, []).shape[1]
        if length + expected_frames > self._config.max_seq_len:
            raise ValueError(self._no_room_message(text, length + expected_frames))
        return length

    def prompt(self, text: str, expected_frames: int) -> tuple[Tensor, int]:
        """The prompt [K+1, T] for `text`, and how many frames the model's context leaves for it.

        Raises as `min_prompt_length` does.
        """
        config, min_length = self._config, self.min_prompt_length(text, expected_frames)
        # A model may say that it was trained on shorter sequences than its context could hold.
        longest = min(config.max_seq_len, config.extra.get("trained_seq_len", config.max_seq_len))
        limit = min(longest - expected_frames, min_length + self._max_tokens)
        kept = list(self._spoken)
        prompt = self._build(text, kept)
        if prompt.shape[1] > limit:
            while len(kept) > 2 and prompt.shape[1] > (min_length + limit) // 2:
                del kept[1]
                prompt = self._build(text, kept)
            while kept and prompt.shape[1] > limit:
                del kept[-1]
                prompt = self._build(text, kept)
            self._spoken[1:] = kept[1:]
        return prompt, config.max_seq_len - prompt.shape[1]

    def reference_prefix(self) -> Tensor | None:
        """The prefix [K+1, T] of all prompts with the references; None without references."""
        if not self._references:
            return None
        codebooks = self._config.num_codebooks
        return build_prefix(
            self._tokenizer, self._references, num_codebooks=codebooks, speaker=self._speaker
        )

    def _build(self, text: str, spoken: list[Utterance]) -> Tensor:
        return build_prompt(
            self._tokenizer,
            text,
            num_codebooks=self._config.num_codebooks,
            references=[*self._references, *spoken],
            speaker=self._speaker,
        )

    def _no_room_message(self, text: str, needed: int) -> str:
        limit = self._config.max_seq_len
        if not self._references:
            return f"{text[:40]!r} needs {needed} tokens, but the model's context has {limit}"
        frames = sum(reference.codes.shape[1] for reference in self._references)
        most = max(0, frames - (needed - limit)) / self._frame_rate
        return (
            f"the reference is too long: {frames / self._frame_rate:.1f} s, but the model's context"
            f" of {limit} tokens leaves room for {most:.1f} s"
        )
