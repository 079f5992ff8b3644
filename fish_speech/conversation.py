"""The only code that builds a prompt: training items and synthesis prompts come from here.

A position of `tokens [K+1, T]` is a text token (row 0, codes 0) or a frame (row 0 the semantic id
of its first code, rows 1..K its codes). One utterance reads

    <|im_start|>system\\nSpeak out the provided text.<|im_end|>
    <|im_start|>user\\n{text}<|im_end|>
    <|im_start|>assistant\\n<|voice|>{frames}<|im_end|>

without the line breaks shown here; earlier user/assistant pairs are a reference voice or the
chunks of a long text that were already spoken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fish_speech.tokenizer import FishTokenizer

SYSTEM_TEXT = "Speak out the provided text."
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Utterance:
    """A text and its `codes [K, T]` (integers of the codec)."""

    text: str
    codes: Tensor


def with_speaker(text: str, speaker: str | None) -> str:
    """The user message of a model with several voices: `[NAME] text`."""
    return f"[{speaker}] {text}" if speaker else text


def build_prompt(
    tokenizer: FishTokenizer,
    text: str,
    *,
    num_codebooks: int,
    references: Sequence[Utterance] = (),
    speaker: str | None = None,
) -> Tensor:
    """The prompt that synthesis continues: tokens [K+1, T] (int64), up to `<|voice|>`."""
    parts = [
        build_prefix(tokenizer, references, num_codebooks=num_codebooks, speaker=speaker),
        _message(tokenizer, "user", with_speaker(text, speaker), num_codebooks),
        _assistant_header(tokenizer, num_codebooks),
        _control(tokenizer, "<|voice|>", num_codebooks),
    ]
    return torch.cat(parts, dim=1)


def build_prefix(
    tokenizer: FishTokenizer,
    utterances: Sequence[Utterance],
    *,
    num_codebooks: int,
    speaker: str | None = None,
) -> Tensor:
    """The prefix of every prompt that has these utterances before its text: tokens [K+1, T]."""
    parts = [_system(tokenizer, num_codebooks)]
    for utterance in utterances:
        parts += _turn(tokenizer, utterance, num_codebooks, speaker)
    return torch.cat(parts, dim=1)


def build_item(
    tokenizer: FishTokenizer,
    utterance: Utterance,
    *,
    references: Sequence[Utterance] = (),
    speaker: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A training item: tokens and labels, both [K+1, T] (int64).

    It is the prompt of `build_prompt`, its answer, and labels shifted left by one. Row 0 learns
    `<|voice|>`, the frames and the last `<|im_end|>`; rows 1..K learn the frames only. Everything
    else, references included, is `IGNORE_INDEX`.
    """
    num_codebooks = len(utterance.codes)
    prompt = build_prompt(
        tokenizer,
        utterance.text,
        num_codebooks=num_codebooks,
        references=references,
        speaker=speaker,
    )
    frames = _frames(tokenizer, utterance.codes)
    whole = torch.cat([prompt, frames, _control(tokenizer, "<|im_end|>", num_codebooks)], dim=1)
    labels = torch.full_like(whole, IGNORE_INDEX)
    voice = prompt.shape[1] - 1
    labels[0, voice:] = whole[0, voice:]
    labels[1:, voice + 1 : -1] = utterance.codes
    return whole[:, :-1], labels[:, 1:]


def _text(ids: Sequence[int], num_codebooks: int) -> Tensor:
    tokens = torch.zeros(num_codebooks + 1, len(ids), dtype=torch.long)
    tokens[0] = torch.tensor(ids, dtype=torch.long)
    return tokens


@lru_cache(maxsize=16)
def _control(tokenizer: FishTokenizer, token: str, num_codebooks: int) -> Tensor:
    return _text([tokenizer.special_tokens[token]], num_codebooks)


@lru_cache(maxsize=16)
def _header(tokenizer: FishTokenizer, role: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(f"<|im_start|>{role}\n", allow_special=True))


@lru_cache(maxsize=16)
def _assistant_header(tokenizer: FishTokenizer, num_codebooks: int) -> Tensor:
    return _text(_header(tokenizer, "assistant"), num_codebooks)


def _message(tokenizer: FishTokenizer, role: str, text: str, num_codebooks: int) -> Tensor:
    # The text is encoded by itself, without specials: nothing a user writes can end a message.
    ids = [*_header(tokenizer, role), *tokenizer.encode(text), tokenizer.im_end_id]
    return _text(ids, num_codebooks)


@lru_cache(maxsize=16)
def _system(tokenizer: FishTokenizer, num_codebooks: int) -> Tensor:
    return _message(tokenizer, "system", SYSTEM_TEXT, num_codebooks)


def _turn(
    tokenizer: FishTokenizer, utterance: Utterance, num_codebooks: int, speaker: str | None
) -> list[Tensor]:
    return [
        _message(tokenizer, "user", with_speaker(utterance.text, speaker), num_codebooks),
        _assistant_header(tokenizer, num_codebooks),
        _control(tokenizer, "<|voice|>", num_codebooks),
        _frames(tokenizer, utterance.codes),
        _control(tokenizer, "<|im_end|>", num_codebooks),
    ]


def _frames(tokenizer: FishTokenizer, codes: Tensor) -> Tensor:
    codes = codes.long()
    return torch.cat([codes[:1] + tokenizer.semantic_begin_id, codes], dim=0)
