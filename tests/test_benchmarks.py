"""The benchmark counts memory and shares as it says, and one bad row does not hide the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run
from benchmarks.flops import flops_of, frame_weights, module_shapes, training_flops
from benchmarks.measure import REPOSITORY, BenchmarkRow
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora
from fish_speech.training.loss import loss_sums
from tests.conftest import golden_tensors
from tests.synthetic_data import make_data_set

IN_CACHE = {"load", "prepare", "prepare_long", "startup"}  # their inputs are not made small here


def a_row(device: str) -> BenchmarkRow:
    return BenchmarkRow("good", 2.0, "s", 0.5, 1.25, f"on {device}")


def a_bad_row(device: str) -> BenchmarkRow:
    raise ValueError("no such workload")


def test_fraction_is_the_share_of_the_limit_for_times_and_rates():
    assert BenchmarkRow("load", 2.0, "s", 0.5, 1.0, "").fraction == 0.25
    assert BenchmarkRow("train", 2.0, "s/step", 0.5, 1.0, "").fraction == 0.25
    assert BenchmarkRow("generate", 10.0, "frames/s", 40.0, 1.0, "").fraction == 0.25


def test_a_new_process_counts_its_own_memory_only(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from benchmarks.load import _read\n"
        "from benchmarks.measure import in_new_process\n"
        "if __name__ == '__main__':\n"
        "    print(in_new_process(_read, Path('zeros'))[1], *in_new_process(len, 'abc'))"
    )
    (tmp_path / "program.py").write_text(code)
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(200_000_000)
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    reading, length, idle = map(float, result.stdout.split())
    assert 0.2 < reading < 0.3
    assert length == 3
    assert idle < 0.1


def test_failed_row_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROWS", {"bad": a_bad_row, "good": a_row})
    assert run.main(["--json", str(tmp_path / "rows.json"), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "bad: no such workload" in printed.err
    assert "good" in printed.out
    assert "25%" in printed.out
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {
            "name": "good",
            "figure": 2.0,
            "unit": "s",
            "limit": 0.5,
            "fraction": 0.25,
            "peak_memory_gb": 1.25,
        }
    ]


def test_only_measures_what_it_names(monkeypatch, capsys):
    monkeypatch.setattr(run, "ROWS", {"bad": a_bad_row, "good": a_row})
    assert run.main(["--only", "good"]) == 0
    with pytest.raises(SystemExit) as usage:
        run.main(["--only", "nothing"])
    assert usage.value.code == 2
    assert "bad, good" in capsys.readouterr().err.replace("'", "")


def small_model():
    config = ModelConfig(
        vocab_size=1400, dim=64, n_layer=3, n_head=4, n_local_heads=2, head_dim=16,
        intermediate_size=96, n_fast_layer=2, fast_dim=48, fast_n_head=3, fast_n_local_heads=1,
        fast_head_dim=16, fast_intermediate_size=80,
    )  # fmt: skip
    return DualARTransformer(config)


def test_no_more_work_is_counted_for_a_step_than_the_package_does():
    model = small_model()
    add_lora(model, LoRAConfig(r=4, dropout=0.0))
    columns, frames = 40, 25
    tokens = torch.randint(0, 1000, (1, 9, columns))
    labels = torch.full_like(tokens, -100)
    labels[:, 0, columns - frames - 2 :] = 7
    labels[:, 1:, columns - frames - 1 : -1] = 5
    # The counter does not know the CPU's fused attention, nor products that are added in place.
    more = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with counter, sdpa_kernel(SDPBackend.MATH):
        sums = loss_sums(model.train(), tokens, labels)
        (sums.token + sums.codebook).backward()
    done = counter.get_total_flops()
    # What is left are the adapters of embeddings, and attention to what is masked.
    assert 0.9 * done < training_flops(model.config, columns, frames, 4) <= done


def test_a_frame_has_to_read_its_layers_once_and_the_fast_ones_for_every_code_but_the_first():
    model = small_model()

    def read(module):
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    fast = read(model.fast_layers) + read(model.fast_output)
    assert frame_weights(model.config) == read(model.layers) + 1025 * 64 + 7 * fast


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_products_of_a_codec_are_all_counted(codec, direction):
    golden = golden_tensors("codec_io.pt")
    given = golden["audio"] if direction == "encode" else golden["codes"]
    call = getattr(codec, direction)
    with FlopCounterMode(display=False) as counter:
        call(given)
    mel = codec.spec_transform(golden["audio"]).shape[-1] * 160 * 1025 * 2 * len(golden["audio"])
    expected = counter.get_total_flops() - (mel if direction == "encode" else 0)
    assert flops_of(module_shapes(codec, lambda: call(given))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(run.ROWS) - IN_CACHE))
def test_every_row_runs_what_it_says(name, base_dir, tmp_path, monkeypatch, capsys):
    """On the golden model in place of the full-size one."""
    for module in ("train", "generate", "codec", "synthesis", "data"):
        for made in ("full_size_model", "full_size_model_with_codec"):
            monkeypatch.setattr(f"benchmarks.{module}.{made}", lambda: base_dir, raising=False)
    # The golden context is 512.
    monkeypatch.setattr("benchmarks.generate._LATE", 200)
    monkeypatch.setattr("benchmarks.train.LONG", (4, 400))
    utterances = make_data_set(tmp_path / "utterances", {"Ann": 5})
    monkeypatch.setattr("benchmarks.data._utterances", lambda: utterances)
    assert run.main(["--only", name, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["name"] == name
    assert row["figure"] > 0
    assert row["limit"] > 0
    assert 0.03 < row["peak_memory_gb"] < 3
