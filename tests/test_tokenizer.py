import json

import pytest

from fish_speech.tokenizer import FishTokenizer
from tests.conftest import GOLDEN

CASES = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["text"][:20])
def test_ids_equal_the_reference(tokenizer, case):
    assert tokenizer.encode(case["text"], allow_special=True) == case["ids"]


def test_special_ids_equal_the_reference(tokenizer):
    assert {name: tokenizer.special_tokens[name] for name in CASES["special"]} == CASES["special"]


def test_text_cannot_inject_a_control_token(tokenizer):
    ids = tokenizer.encode("<|im_end|><|semantic:7|>")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "<|im_end|><|semantic:7|>"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = FishTokenizer.from_pretrained(tmp_path)
    assert again.special_tokens == tokenizer.special_tokens
    assert again.encode("The quick brown fox") == tokenizer.encode("The quick brown fox")
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == (
        GOLDEN / "model" / "tokenizer.tiktoken"
    ).read_bytes()


def test_special_ids_of_a_new_tokenizer_follow_the_last_rank():
    tokenizer = FishTokenizer.from_ranks({bytes([i]): i for i in range(256)})
    assert tokenizer.special_tokens["<|begin_of_text|>"] == 256
    assert tokenizer.semantic_begin_id == 256 + 12
    assert tokenizer.vocab_size == 256 + 1036


def test_a_damaged_tokenizer_is_named_with_its_line(tmp_path):
    (tmp_path / "special_tokens.json").write_text("{}")
    for second in ("not base64!", "ÄÖÜ 1", "AA=="):
        (tmp_path / "tokenizer.tiktoken").write_text(f"AA== 0\n{second}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer\.tiktoken, line 2"):
            FishTokenizer.from_pretrained(tmp_path)


def test_a_missing_special_token_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "special_tokens.json").write_text('{"<|semantic:0|>": 400}')
    with pytest.raises(ValueError, match="im_end"):
        FishTokenizer.from_pretrained(tmp_path)


def with_rank(number, rank):
    return lambda lines: [
        b"%b %b" % (line.split()[0], rank) if index == number else line
        for index, line in enumerate(lines)
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [line for line in lines if line != b"ZQ== 101"],  # the byte of "e"
        with_rank(101, b"100"),
        with_rank(101, b"-1"),
        with_rank(101, b"4294967296"),
        with_rank(101, b"400"),  # that of a special token
        lambda lines: lines[:-9],  # cut short
        lambda lines: lines[:150],
        lambda lines: [*lines, lines[3].split()[0] + b" 400"],
        lambda lines: [b"enp6enp6 101" if line == b"ZQ== 101" else line for line in lines],
        lambda lines: [],
    ],
)
def test_damaged_ranks_are_named_with_the_remedy(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.tiktoken"
    lines = file.read_bytes().splitlines()
    assert b"ZQ== 101" in lines
    assert damage(lines) != lines
    file.write_bytes(b"\n".join(damage(lines)) + b"\n")
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken.* get (it|both) again$"):
        FishTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("counted", [0, 1])
def test_a_line_for_no_token_is_skipped_as_upstream_does(tokenizer, tmp_path, counted):
    """Whether special ids count it or not."""
    tokenizer.save(tmp_path)
    with (tmp_path / "tokenizer.tiktoken").open("a") as file:
        file.write(f"= {len(tokenizer._ranks)}\n")
    special = {token: id + counted for token, id in tokenizer.special_tokens.items()}
    (tmp_path / "special_tokens.json").write_text(json.dumps(special))
    again = FishTokenizer.from_pretrained(tmp_path)
    assert again.encode("The ferry leaves.") == tokenizer.encode("The ferry leaves.")
    assert again.semantic_begin_id == tokenizer.semantic_begin_id + counted


@pytest.mark.parametrize("id", ["402", None, -1, 65, 403, 402.0, 1 << 32, True])
def test_a_special_id_that_can_not_be_is_named_with_the_remedy(tokenizer, tmp_path, id):
    tokenizer.save(tmp_path)
    assert tokenizer.special_tokens["<|pad|>"] == 402
    special = json.dumps({**tokenizer.special_tokens, "<|pad|>": id})
    (tmp_path / "special_tokens.json").write_text(special)
    with pytest.raises(ValueError, match=r"special_tokens\.json: .* get both again"):
        FishTokenizer.from_pretrained(tmp_path)


def test_semantic_ids_in_another_order_are_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    ids = dict(tokenizer.special_tokens)
    ids["<|semantic:3|>"], ids["<|semantic:4|>"] = ids["<|semantic:4|>"], ids["<|semantic:3|>"]
    (tmp_path / "special_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(ValueError, match=r"special_tokens\.json: .*semantic:3.* get it again"):
        FishTokenizer.from_pretrained(tmp_path)
