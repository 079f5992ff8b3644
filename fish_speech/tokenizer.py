"""The byte-pair tokenizer of a model directory: text, control tokens and semantic tokens."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tiktoken

from fish_speech.files import read_json, write_bytes, write_json

TOKENIZER_FILE = "tokenizer.tiktoken"
SPECIAL_TOKENS_FILE = "special_tokens.json"

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|placeholder:{i}|>" for i in range(4)),
    "<|text|>",
    "<|voice|>",
    "<|interleave|>",
)

_NEEDED_TOKENS = "<|im_end|>", "<|im_start|>", "<|voice|>", "<|end_of_text|>", "<|semantic:0|>"
# The bytes that UTF-8 has: the encoder panics at one that is no token.
_UTF8_BYTES = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}

# The last but one alternative was meant as the lookahead `\s+(?!\S)`; the published weights were
# trained with the typo, so it stays.
_SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"\p{P}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(\?!\S)",
        r"\s+",
    )
)


class FishTokenizer:
    """Maps text to ids and knows the ids of the control and semantic tokens.

    `semantic_begin_id + c` is the id of `<|semantic:c|>`, the row-0 token of a frame whose first
    code is c.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
        self.special_tokens = dict(special_tokens)
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            "fish_speech",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        semantic = [token for token in special_tokens if token.startswith("<|semantic:")]
        self.codebook_size = len(semantic)
        self.semantic_begin_id = self.special_tokens["<|semantic:0|>"]
        for code in range(self.codebook_size):
            if self.special_tokens.get(f"<|semantic:{code}|>") != self.semantic_begin_id + code:
                raise ValueError(f"<|semantic:{code}|> is not id {self.semantic_begin_id + code}")
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.end_of_text_id = self.special_tokens["<|end_of_text|>"]

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], codebook_size: int = 1024) -> FishTokenizer:
        """A new tokenizer: special ids follow the last rank, in the published order."""
        names = (*CONTROL_TOKENS, *(f"<|semantic:{i}|>" for i in range(codebook_size)))
        return cls(ranks, {name: len(ranks) + i for i, name in enumerate(names)})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FishTokenizer:
        """Read `tokenizer.tiktoken` and `special_tokens.json` of a model directory.

        Raises `FileNotFoundError`, or `ValueError` that names the file that can't be read.
        """
        directory = Path(directory)
        ranks_file, special_file = directory / TOKENIZER_FILE, directory / SPECIAL_TOKENS_FILE
        for file in (ranks_file, special_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing; a model directory needs it")
        ranks: dict[bytes, int] = {}
        empty: list[int] = []  # ranks of lines for no token ("="), which upstream skips
        for number, line in enumerate(ranks_file.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                if token == b"=":
                    empty.append(int(rank))
                else:
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"{ranks_file}, line {number}: not 'base64 rank'") from error
        special_tokens = read_json(special_file)
        if not isinstance(special_tokens, dict):
            raise ValueError(f"{special_file}: not a map from token to id")
        for token in _NEEDED_TOKENS:
            if token not in special_tokens:
                raise ValueError(f"{special_file}: the token '{token}' is missing; get it again")
        taken = sorted([*ranks.values(), *empty])
        if taken != list(range(len(taken))) or _UTF8_BYTES - ranks.keys():
            raise ValueError(
                f"{ranks_file}: damaged, tokens are missing or ranks not in a row; get it again"
            )
        ids, count = special_tokens.values(), len(special_tokens)
        fitting = [list(range(first, first + count)) for first in (len(taken), len(ranks))]
        if any(type(id) is not int for id in ids) or sorted(ids) not in fitting:
            raise ValueError(
                f"{special_file}: the ids are not {fitting[0][0]} to {fitting[0][-1]}, those after "
                f"the last rank of {TOKENIZER_FILE}; one of the two files is damaged, so get both "
                "again"
            )
        try:
            return cls(ranks, special_tokens)
        except ValueError as error:
            raise ValueError(f"{special_file}: {error}; get it again") from error

    def save(self, directory: str | Path) -> None:
        """Write both files in the published layout."""
        directory = Path(directory)
        lines = (
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(self._ranks.items(), key=lambda item: item[1])
        )
        write_bytes(directory / TOKENIZER_FILE, b"".join(lines))
        write_json(directory / SPECIAL_TOKENS_FILE, self.special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and special tokens."""
        return self._encoding.n_vocab

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. Control tokens written in it stay plain text unless `allow_special`."""
        allowed = "all" if allow_special else set()
        return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are written as such."""
        return self._encoding.decode(ids)
