import json
import re
import sys

import pytest
import torch

from fish_speech.models.text2semantic import ModelConfig, load_model, save_model
from fish_speech.tokenizer import FishTokenizer
from tests.conftest import GOLDEN


@pytest.fixture
def directory(tmp_path):
    """A copy of the golden model directory that a test may spoil."""
    for file in (GOLDEN / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(directory, change):
    state = torch.load(directory / "model.pth", weights_only=True)
    changed = change(state)
    torch.save(changed if isinstance(changed, dict) else state, directory / "model.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {f"model.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    ],
)
def test_every_wrapper_and_prefix_loads_to_the_same_weights(model, directory, wrap):
    rewrite(directory, wrap)
    torch.testing.assert_close(load_model(directory).state_dict(), model.state_dict())


def test_separate_q_k_v_are_joined(model, directory):
    def split(state):
        for key in [k for k in state if k.endswith("attention.wqkv.weight")]:
            q, k, v = state.pop(key).split([64, 32, 32])
            for name, part in zip(("wq", "wk", "wv"), (q, k, v), strict=True):
                state[key.replace("wqkv", name)] = part.clone()

    rewrite(directory, split)
    torch.testing.assert_close(load_model(directory).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"'norm\.weight' \(64,\) is missing"),
        (lambda s: s.update(more=torch.zeros(2)), r"'more' \(2,\) is not known"),
        (
            lambda s: s.update({"norm.weight": torch.zeros(65)}),
            r"'norm\.weight' has shape \(65,\), but the config says \(64,\)",
        ),
        (lambda s: {"lora": {}}, "not a state dict"),
        (
            lambda s: {"state_dict": {"model.output.lora_A": torch.zeros(1)}},
            "adapters that are not merged.*--merge-weights",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_error(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}"):
        load_model(directory)


def test_a_truncated_file_is_named(directory):
    data = (directory / "model.pth").read_bytes()
    (directory / "model.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.pth: damaged, cut short"):
        load_model(directory)


def test_a_file_with_code_in_it_is_refused(directory):
    torch.save({"weight": print}, directory / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: damaged"):
        load_model(directory)


def test_a_file_of_an_old_pytorch_loads(model, directory):
    state = torch.load(directory / "model.pth", weights_only=True)
    torch.save(state, directory / "model.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load_model(directory).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": "64"}, "dim is '64', not a whole number"),
        ({"head_dim": 9}, "must be even"),
        ({"dim": 64.0}, "dim is 64.0, not a whole number"),
        ({"fast_n_head": -2}, "fast_n_head is -2"),
        ({"n_fast_layer": 10**30}, "n_fast_layer is 1000"),
        ({"rope_base": float("nan")}, "rope_base is nan"),
        ({"norm_eps": -1}, "norm_eps is -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"speakers": 5}, "speakers is 5, not a list of names"),
    ],
)
def test_a_config_that_can_not_be_is_refused(directory, wrong, message):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*{message}"):
        load_model(directory)


def test_another_model_type_is_refused(directory):
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llama'"):
        load_model(directory)


@pytest.mark.parametrize(
    "name", ["config.json", "model.pth", "tokenizer.tiktoken", "special_tokens.json"]
)
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_model(directory)


def test_a_tokenizer_of_another_model_is_refused(directory):
    ranks = {bytes([i]): i for i in range(256)}
    FishTokenizer.from_ranks(ranks).save(directory)
    with pytest.raises(ValueError, match="belong to different models"):
        load_model(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saving_writes_the_published_layout_in_the_dtype_asked_for(
    model, tokenizer, tmp_path, dtype
):
    save_model(model.state_dict(), tmp_path, config=model.config, tokenizer=tokenizer, dtype=dtype)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.pth",
        "special_tokens.json",
        "tokenizer.tiktoken",
    ]
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    golden = torch.load(GOLDEN / "model" / "model.pth", weights_only=True)
    assert state.keys() == golden.keys()
    assert all(torch.equal(state[key], golden[key].to(dtype)) for key in golden)
    # The keys that the model itself does not use are kept.
    written, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / "model")
    )
    assert original.items() <= written.items()


def test_published_defaults_have_638_million_parameters():
    from fish_speech.models.text2semantic import DualARTransformer
    from fish_speech.models.weights import empty_modules

    with empty_modules():
        model = DualARTransformer(ModelConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 638


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_and_not_copied(directory):
    weight = load_model(directory).embeddings.weight
    with open("/proc/self/maps", encoding="utf-8") as maps:
        regions = [line.split(maxsplit=5) for line in maps if "model.pth" in line]
    spans = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions]
    assert any(begin <= weight.data_ptr() < end for begin, end in spans)
