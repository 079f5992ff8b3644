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
