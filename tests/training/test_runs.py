import os
import re
from pathlib import Path

import pytest
import torch

from fish_speech.models.text2semantic.lora import LoRAConfig
from fish_speech.training.resume import choose_start
from fish_speech.training.runs import Run, describe_checkpoints, real_path


def make_checkpoints(project, *steps, data_dir="data", parent=None, base="base", r=8):
    run = Run.of(project)
    run.checkpoint_folder.mkdir(parents=True, exist_ok=True)
    lora = {"r": r, "alpha": 16, "dropout": 0.0, "targets": ["wqkv"]}
    record = {"data_dir": str(Path(data_dir).resolve()), "parent": parent, "lora": lora}
    record |= {"base": str(Path(base).resolve()), "base_digest": "0"}
    for step in steps:
        torch.save({"state_dict": {}, "run": record}, run.checkpoint_path(step))
    return run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_list_is_in_the_guides_format(tmp_path):
    run = make_checkpoints("note_lm_step2", 100, 200, parent="results/a/x.ckpt")
    log = run.logs / "run_001"
    log.mkdir(parents=True)
    (log / "metrics.csv").write_text("step,validation/loss\n99,7.25\n150,\n")
    lines = describe_checkpoints(run).splitlines()
    assert lines[0] == "📂 Available checkpoints for project 'note_lm_step2':"
    form = r"📄 step_000000100\.ckpt \(\d+\.\d MB, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    assert re.match(form, lines[1])
    assert lines[1].endswith(" step 100, validation loss 7.250, from results/a/x.ckpt")
    assert lines[3] == "🎯 Latest: step_000000200.ckpt"


def test_a_project_without_checkpoints_has_a_list_too():
    assert describe_checkpoints(Run.of("new")) == "📂 No checkpoints for project 'new' yet."
    make_checkpoints("news", 100)
    assert describe_checkpoints(Run.of("new")).endswith(" yet. Projects here: news.")


def test_damaged_checkpoints_are_listed_as_such():
    run = make_checkpoints("p", 100, 200, 300)
    run.checkpoint_path(100).write_bytes(b"half")
    torch.save({"state_dict": {}, "run": {"data_dir": "x"}}, run.checkpoint_path(200))
    torch.save({"state_dict": {}, "run": None}, run.checkpoint_path(300))
    shown = describe_checkpoints(run)
    assert all(f"step {step}, damaged" in shown for step in (100, 200, 300))
    with pytest.raises(ValueError, match=r"step_000000200\.ckpt: .* base, base_digest, lora"):
        run.checkpoint(200).read()


def test_a_checkpoint_that_changed_on_disk_is_not_resumed():
    run = make_checkpoints("p", 100)
    path = run.checkpoint_path(100)
    content = torch.load(path)
    with pytest.raises(ValueError, match="holds no global_step, loops, optimizer_states"):
        run.checkpoint(100).check()
    whole = content | {"global_step": 100, "loops": {}, "optimizer_states": []}
    torch.save(whole | {"state_dict": {"x": torch.ones(5000)}}, path)
    run.checkpoint(100).check()
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(9).numpy().tobytes()) + 20] ^= 4
    path.write_bytes(data)
    assert run.checkpoint(100).read()
    with pytest.raises(ValueError, match=r"step_000000100\.ckpt: damaged since it was written"):
        run.checkpoint(100).check()


def test_damaged_logs_count_as_far_as_they_can_be_read():
    run = Run.of("p")
    for number, rows in enumerate((b"1,7.0\nabc,6.0\n2,six\n3,nan\n4,5.0\n", b"\xff\x00\n"), 1):
        folder = run.logs / f"run_{number:03d}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_bytes(b"step,train/loss\n" + rows)
    assert run.logged("train/loss") == {2: 7.0, 5: 5.0}


def test_a_config_that_is_gone_comes_back_from_the_checkpoint():
    run = make_checkpoints("p", 100)
    assert run.restored_config() is None  # of a version that kept none there
    content = torch.load(run.checkpoint_path(100))
    content["run"]["config"] = "project: p"
    torch.save(content, run.checkpoint_path(100))
    assert run.restored_config().read_text() == "project: p"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "a b", "a\\b"])
def test_project_names_that_are_no_folder_are_refused(name):
    with pytest.raises(ValueError, match="--project"):
        Run.of(name)


def test_a_step_that_is_not_there_lists_those_that_are():
    run = make_checkpoints("p", 100, 200)
    assert run.checkpoint().step == 200
    assert run.checkpoint(100).step == 100
    with pytest.raises(FileNotFoundError, match=r"no such step, only 100, 200"):
        run.checkpoint(150)


def test_own_checkpoints_are_resumed_exactly():
    run = make_checkpoints("p", 100, 200)
    start = choose_start(run, Path("data"), resume_latest=True)
    assert (start.checkpoint.step, start.resumes) == (200, True)
    named = choose_start(run, Path("data"), resume_from=str(run.checkpoint_path(100)))
    assert (named.checkpoint.step, named.resumes) == (100, True)


def test_the_guides_spelling_of_results_means_the_same():
    first = make_checkpoints("first", 100)
    path = f"fish-speech/{first.checkpoint_path(100)}"
    start = choose_start(Run.of("second"), Path("data"), resume_from=path)
    assert (start.checkpoint.path, start.resumes) == (first.checkpoint_path(100), False)
    assert real_path("fish-speech/results/x") == Path("results/x")


def test_a_new_project_starts_from_the_newest_on_the_same_data():
    make_checkpoints("other_data", 900, data_dir="elsewhere")
    make_checkpoints("stage1", 100, 200)
    start = choose_start(Run.of("stage2"), Path("data"), resume_latest=True)
    assert start.checkpoint.path == Run.of("stage1").checkpoint_path(200)
    assert not start.resumes
    assert "stage2" in start.reason
    assert "stage1" in start.reason


def test_a_folder_of_checkpoints_means_its_newest():
    stage1 = make_checkpoints("stage1", 100, 300)
    for path in (stage1.checkpoint_folder, stage1.folder):
        start = choose_start(Run.of("stage2"), Path("data"), checkpoint_path=str(path))
        assert (start.checkpoint.step, start.resumes) == (300, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resume_latest": True}, r"--resume-latest: no checkpoint"),
        ({"resume_latest": True, "resume_from": "x"}, "exclude each other"),
        ({"resume_from": "x", "checkpoint_path": "y"}, "exclude each other"),
        ({"checkpoint_path": "nowhere"}, "no such checkpoint"),
        ({"resume_from": "results/no/step_000000100.ckpt"}, r"no such checkpoint \(in that folder"),
        ({"checkpoint_path": "."}, r"no step_\*\.ckpt"),
    ],
)
def test_a_start_that_is_not_there_is_an_error(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        choose_start(Run.of("p"), Path("data"), **flags)


def test_a_project_is_never_started_over():
    run = make_checkpoints("p", 100)
    start = choose_start(run, Path("data"))
    assert (start.checkpoint.step, start.resumes) == (100, True)
    assert "resuming from" in start.reason


def test_the_same_command_goes_on_after_a_warm_start():
    other = make_checkpoints("other", 50).checkpoint_path(50)
    run = make_checkpoints("p", 100, parent=str(other))
    make_checkpoints("other", 80)  # it was trained on since then
    for flags in ({"checkpoint_path": "results/other"}, {"resume_from": str(other)}):
        start = choose_start(run, Path("data"), **flags)
        assert (start.checkpoint.step, start.resumes) == (100, True)


def test_own_checkpoints_are_not_given_up_for_another_projects():
    run = make_checkpoints("p", 100)
    other = make_checkpoints("other", 50).checkpoint_path(50)
    for flag in ("resume_from", "checkpoint_path"):
        with pytest.raises(ValueError, match="choose another --project"):
            choose_start(run, Path("data"), **{flag: str(other)})
    start = choose_start(run, Path("data"), checkpoint_path="results/p")
    assert (start.checkpoint.step, start.resumes) == (100, True)


def test_of_its_own_checkpoints_only_the_newest_is_gone_on_from_by_its_path():
    run = make_checkpoints("p", 100, 200)
    start = choose_start(run, Path("data"), checkpoint_path=str(run.checkpoint_path(200)))
    assert (start.checkpoint.step, start.resumes) == (200, True)
    older = str(run.checkpoint_path(100))
    with pytest.raises(ValueError, match=f"--resume-from-checkpoint {older} goes back"):
        choose_start(run, Path("data"), checkpoint_path=older)
    assert choose_start(run, Path("data"), resume_from=older).checkpoint.step == 100


def test_damage_other_bases_and_other_adapters_are_passed_over_in_the_search():
    make_checkpoints("fits", 100)
    make_checkpoints("damaged", 100).checkpoint_path(100).write_bytes(b"half")
    make_checkpoints("other_base", 100, base="other")
    make_checkpoints("other_rank", 100, r=4)
    for number, name in enumerate(("fits", "damaged", "other_base", "other_rank")):
        os.utime(Run.of(name).checkpoint_path(100), (number, number))
    wanted = {"lora": LoRAConfig(8, 16, 0.1, ("wqkv",)), "base": Path("base")}
    start = choose_start(Run.of("new"), Path("data"), resume_latest=True, **wanted)
    assert start.checkpoint.path == Run.of("fits").checkpoint_path(100)
    start = choose_start(Run.of("new"), Path("data"), resume_latest=True)
    assert start.checkpoint.path == Run.of("other_rank").checkpoint_path(100)


def test_a_log_folder_is_never_used_twice(tmp_path):
    run = Run.of("p")
    for name in ("run_001", "run_007", "run_x"):
        (run.logs / name).mkdir(parents=True)
    assert run.new_log() == "run_008"


def test_what_a_later_start_did_again_is_forgotten():
    run = Run.of("p")
    logged = {"run_001": (99, 199, 299), "run_002": (149,), "run_010": (), "run_011": (159,)}
    for name, steps in logged.items():
        (run.logs / name).mkdir(parents=True)
        lines = [f"{step},{name[4:]}" for step in steps]
        (run.logs / name / "metrics.csv").write_text("\n".join(["step,validation/loss", *lines]))
    assert run.logged("validation/loss") == {100: 1, 150: 2, 160: 11}


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: not a checkpoint"):
        choose_start(Run.of("p"), Path("data"), resume_from=str(tmp_path / "model.pth"))


def test_a_merged_model_is_no_checkpoint_and_the_flag_for_it_is_named(tmp_path):
    (tmp_path / "p-merged").mkdir()
    (tmp_path / "p-merged" / "model.pth").touch()
    with pytest.raises(FileNotFoundError, match="--pretrained-ckpt-path takes that"):
        choose_start(Run.of("new"), Path("data"), checkpoint_path="p-merged")
