import json
import shutil

import pytest
import torch

from fish_speech.datasets.spans import learned_by_model
from fish_speech.files import file_digest
from fish_speech.models.text2semantic import load_model, save_model
from fish_speech.models.text2semantic.lora import EMBEDDING_TARGETS, LINEAR_TARGETS, LoRAConfig
from fish_speech.models.vqgan import load_codec
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training import merge as merging
from fish_speech.training.merge import merge
from fish_speech.training.runs import Checkpoint
from tests.conftest import golden_tensors


@pytest.fixture
def checkpoint(tmp_path, base_dir):
    """A checkpoint that holds the adapters that upstream trained over the golden model."""

    def write(state=None, base=base_dir, **record):
        run = {
            "data_dir": "data",
            "parent": None,
            "base": str(base),
            "base_digest": file_digest(base / "model.pth"),
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0,
                     "targets": [*LINEAR_TARGETS, *EMBEDDING_TARGETS]},
            **record,
        }  # fmt: skip
        path = tmp_path / "step_000000007.ckpt"
        state = state or golden_tensors("lora.pt")["lora_ckpt"]["state_dict"]
        torch.save({"state_dict": state, "run": run}, path)
        return Checkpoint(path, 7)

    return write


def test_adapters_of_the_reference_merge_to_its_weights(checkpoint, tmp_path):
    merged = merge(checkpoint(), tmp_path / "merged")
    state = load_model(merged.folder).state_dict()
    golden = golden_tensors("lora.pt")["merged"]
    every_16th = golden.pop("codebook_embeddings.weight")
    torch.testing.assert_close(state["codebook_embeddings.weight"][::16], every_16th)
    for name, weight in golden.items():
        torch.testing.assert_close(state[name], weight, atol=1e-4, rtol=1e-4)
    assert merged.error < 1e-5
    assert merged.change > 0.1


def test_the_merged_directory_stands_by_itself(checkpoint, tmp_path, base_dir):
    folder = merge(checkpoint(), tmp_path / "merged").folder
    assert {file.name for file in folder.iterdir()} == {file.name for file in base_dir.iterdir()}
    assert load_codec(folder).frame_length == 2048
    original, written = (json.loads((d / "config.json").read_text()) for d in (base_dir, folder))
    assert original.items() <= written.items()


def test_the_merged_model_knows_what_it_has_learned(checkpoint, tmp_path, base_dir):
    first = merge(checkpoint(learned='[["one", 0.0, 4.0]]'), tmp_path / "first").folder
    more = checkpoint(base=first, learned='[["one", 4.0, 8.0]]')
    second = merge(more, tmp_path / "second").folder
    assert list(learned_by_model(second)) == [["one", 0.0, 8.0]]
    assert not learned_by_model(base_dir)


@pytest.mark.parametrize("speakers", [["Ann", "Bob"], []])
def test_the_merged_model_lists_the_speakers_it_was_trained_with(
    checkpoint, tmp_path, base_dir, speakers
):
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "speakers": ["of the base"]}))
    folder = merge(checkpoint(base=base, speakers=speakers), tmp_path / "merged").folder
    assert json.loads((folder / "config.json").read_text())["speakers"] == speakers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_keeps_its_dtype(checkpoint, tmp_path, base_dir, dtype):
    base = tmp_path / "base"
    model = load_model(base_dir)
    save_model(
        model.state_dict(),
        base,
        config=model.config,
        tokenizer=FishTokenizer.from_pretrained(base_dir),
        dtype=dtype,
    )
    for name in ("firefly-gan-vq-golden.pth", "codec_config.json"):
        (base / name).write_bytes((base_dir / name).read_bytes())
    merged = merge(checkpoint(base=base), tmp_path / "merged")
    assert load_model(merged.folder).dtype == dtype
    assert 0 < merged.error < 0.02


def test_a_merged_model_that_would_be_the_base_is_an_error(checkpoint, tmp_path):
    state = golden_tensors("lora.pt")["lora_ckpt"]["state_dict"]
    nothing = {key: torch.zeros_like(value) for key, value in state.items()}
    with pytest.raises(ValueError, match="its adapters change nothing"):
        merge(checkpoint(nothing), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_that_are_no_numbers_are_not_merged(checkpoint, tmp_path):
    state = golden_tensors("lora.pt")["lora_ckpt"]["state_dict"]
    name = next(key for key in state if key.endswith("lora_B"))
    damaged = {**state, name: torch.full_like(state[name], torch.nan)}
    with pytest.raises(ValueError, match="adapters are damaged"):
        merge(checkpoint(damaged), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_over_another_base_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="has changed since"):
        merge(checkpoint(base_digest="0" * 64), tmp_path / "merged")


def test_a_base_that_has_gone_is_asked_for(checkpoint, tmp_path, base_dir):
    made = checkpoint()
    content = torch.load(made.path, weights_only=True)
    content["run"]["base"] = str(tmp_path / "gone")
    torch.save(content, made.path)
    with pytest.raises(FileNotFoundError, match="--pretrained-ckpt-path"):
        merge(made, tmp_path / "merged")
    assert merge(made, tmp_path / "merged", base_dir=base_dir).change > 0.1


def test_merging_again_replaces_the_model_and_keeps_what_lies_beside_it(checkpoint, tmp_path):
    folder = tmp_path / "merged"
    (folder / "samples").mkdir(parents=True)
    for name in ("firefly-gan-vq-old.pth", "notes.txt", "samples/me.wav"):
        (folder / name).write_bytes(b"x")
    (folder / "gone").symlink_to("nowhere")
    (folder / "up").symlink_to("..")
    merge(checkpoint(), folder)
    assert [(folder / name).readlink().name for name in ("gone", "up")] == ["nowhere", ".."]
    assert not (folder / "firefly-gan-vq-old.pth").exists()
    assert load_model(folder)
    assert [(folder / name).read_bytes() for name in ("notes.txt", "samples/me.wav")] == [b"x"] * 2
    assert [item for item in tmp_path.iterdir() if item.name.startswith(".tmp")] == []


def test_two_merges_do_not_write_one_folder(checkpoint, tmp_path, monkeypatch):
    made, save = checkpoint(), merging.save_model

    def save_and_merge(*arguments, **more):
        with pytest.raises(ValueError, match="merged, being written, is in use by"):
            merge(made, tmp_path / "merged")
        return save(*arguments, **more)

    monkeypatch.setattr(merging, "save_model", save_and_merge)
    assert merge(made, tmp_path / "merged").change > 0.1


def test_a_checkpoint_of_the_reference_needs_its_base_and_config_named(tmp_path, base_dir):
    path = tmp_path / "reference.ckpt"
    torch.save(golden_tensors("lora.pt")["lora_ckpt"], path)
    with pytest.raises(ValueError, match="--lora-config"):
        merge(Checkpoint(path, 0), tmp_path / "merged")
    merged = merge(Checkpoint(path, 0), tmp_path / "merged", base_dir=base_dir, lora=LoRAConfig())
    assert merged.error < 1e-5 < merged.change


@pytest.mark.parametrize("left_out", [(), EMBEDDING_TARGETS])
def test_what_a_file_of_the_reference_adapts_is_told_by_its_keys(tmp_path, base_dir, left_out):
    state = golden_tensors("lora.pt")["lora_ckpt"]["state_dict"]
    state = {k: v for k, v in state.items() if k.split(".")[-2] not in left_out}
    path = tmp_path / "step_000000007.ckpt"
    torch.save({"state_dict": state}, path)
    for preset in (LoRAConfig(), LoRAConfig(targets=LINEAR_TARGETS)):
        merged = merge(Checkpoint(path, 7), tmp_path / "merged", base_dir=base_dir, lora=preset)
        embeddings = load_model(merged.folder).embeddings.weight
        same = torch.equal(embeddings, load_model(base_dir).embeddings.weight)
        assert same == bool(left_out)


def test_the_same_merge_again_is_the_same_file(checkpoint, tmp_path):
    """Else no project that was trained over it could go on."""
    for name in ("one", "two"):
        merge(checkpoint(), tmp_path / name)
    assert file_digest(tmp_path / "one/model.pth") == file_digest(tmp_path / "two/model.pth")


def test_another_lora_config_than_the_checkpoint_s_is_refused(checkpoint, tmp_path):
    lora = LoRAConfig(4, 16, 0.0, (*LINEAR_TARGETS, *EMBEDDING_TARGETS))
    with pytest.raises(ValueError, match="trained with another --lora-config: r 8, not 4"):
        merge(checkpoint(), tmp_path / "merged", lora=lora)
