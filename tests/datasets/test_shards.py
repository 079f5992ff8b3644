import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fish_speech.datasets.clips import Clip, find_clips
from fish_speech.datasets.shards import (
    Manifest,
    _choose_validation,
    build_shards,
    learned_by,
    no_validation_reason,
    read_samples,
)
from fish_speech.files import write_json
from fish_speech.inference.speakers import check_speaker, resolve_speaker
from tests.conftest import GOLDEN
from tests.synthetic_data import make_data_set


def build(folder, **changes):
    return build_shards(folder, **{"num_codebooks": 8, "codebook_size": 1024, **changes})


def test_every_clip_is_in_one_split_and_comes_back_as_it_was(tmp_path):
    data = make_data_set(tmp_path / "voices", {"Ann": 30, "Bob": 12})
    manifest, rebuilt = build(data, validation_share=0.1)
    assert rebuilt
    assert manifest.speakers == ["Ann", "Bob"]
    assert len(manifest.validation) == 3
    assert not set(manifest.train) & set(manifest.validation)
    assert len(manifest.train) + len(manifest.validation) == 42
    for split in ("train", "validation"):
        samples = list(read_samples(manifest.paths(data, split)))
        assert len(samples) == len(getattr(manifest, split))
        for name, sample in zip(getattr(manifest, split), samples, strict=True):
            assert sample.speaker == name.split("/")[0]
            assert sample.text == (data / f"{name}.lab").read_text()
            assert np.array_equal(sample.codes, np.load(data / f"{name}.npy"))


def test_packing_again_does_nothing_until_something_changes(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 5})
    first, _ = build(data)
    assert build(data) == (first, False)
    lab = data / "Ann" / "clip_0001.lab"
    lab.write_text("Corrected words.")
    os.utime(lab, ns=(1, 1))
    changed, rebuilt = build(data)
    assert rebuilt
    paths = changed.paths(data, "train") + changed.paths(data, "validation")
    assert "Corrected words." in [sample.text for sample in read_samples(paths)]
    next(iter(data.glob("protos/train-*"))).write_bytes(b"spoilt")
    assert build(data)[1]


def test_a_data_set_that_was_renamed_has_its_new_name_for_a_speaker(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 5}) / "Ann"
    build(data)
    manifest, _ = build(data.rename(tmp_path / "Anna"))
    assert manifest.speakers == ["Anna"]


def test_what_was_trained_on_is_never_held_out_later(tmp_path):
    few, _ = build(make_data_set(tmp_path / "few", {"Ann": 30}), validation_share=0.2)
    many, _ = build(make_data_set(tmp_path / "many", {"Ann": 120}), validation_share=0.2)
    assert 3 <= len(few.validation) < len(many.validation)
    assert 10 < len(many.validation) < 40
    assert not set(few.train) & set(many.validation)


def test_clips_that_come_or_go_move_no_learned_clip_to_the_held_out_ones(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 20})
    last = data / "Ann" / "clip_0019.lab"
    last.rename(data / "later")
    few, _ = build(data)
    assert len(few.validation) == 1
    (data / "later").rename(last)
    more, _ = build(data)
    assert not set(few.train) & set(more.validation)
    assert set(few.validation) <= set(more.validation)
    (data / f"{more.validation[0]}.lab").unlink()
    fewer, _ = build(data)
    assert not set(more.train) & set(fewer.validation)


def test_what_is_held_out_stays_so_when_clips_are_added(tmp_path):
    voice, share = make_data_set(tmp_path / "voice", {"Ann": 9}), {"validation_share": 0.1}
    few, _ = build(voice, **share)
    assert few.validation == ["Ann/clip_0008"]  # for want of one whose digest chose it
    make_data_set(tmp_path / "more", {"Ann": 19})
    for file in (tmp_path / "more" / "Ann").iterdir():
        file.replace(voice / "Ann" / file.name)
    many, _ = build(voice, **share)
    assert many.validation == ["Ann/clip_0008", "Ann/clip_0009"]
    (voice / "Ann" / "clip_0000.lab").write_text("Other words.")
    again, rebuilt = build(voice, **share)
    assert rebuilt
    assert again.validation == many.validation
    less, _ = build(voice, validation_share=0.01)
    assert len(less.validation) == 1


def held_out_of(manifest):
    return {span for name in manifest.validation for span, *_ in manifest.spans[name]}


@pytest.mark.parametrize("count", [200, 1000])
def test_renaming_moves_no_clip_between_what_is_learned_and_what_is_held_out(count):
    for attempt in range(10):
        spans = {f"{attempt} {n}": [[f"{attempt} {n}", 0.0, 1.0]] for n in range(count)}
        clips = [Clip(name, "Ann", Path()) for name in spans]
        held = _choose_validation(clips, 0.05, spans, Manifest("", []))
        train = [name for name in spans if name not in held]
        before = Manifest("", [], train, list(held), spans=spans, validation_share=0.05)
        renamed = {f"new {name}": known for name, known in spans.items()}
        more = renamed | {f"{attempt} more": [["more", 0.0, 1.0]]}
        clips = [Clip(name, "Ann", Path()) for name in more]
        after = _choose_validation(clips, 0.05, more, before)
        assert {name.removeprefix("new ") for name in after if "more" not in name} == held
        larger = _choose_validation(clips, 0.2, more, before)
        assert after < larger
        assert 0.1 * count < len(larger) < 0.3 * count
        smaller = _choose_validation(clips, 0.01, more, before)
        assert 0 < len(smaller & after) == len(smaller) < len(after)


def test_codes_that_were_made_again_are_of_the_same_clips(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 30})
    before, _ = build(data)
    for label in (False, True):  # then packed once more
        for file in data.glob("Ann/*.lab" if label else "Ann/*.npy"):
            if label:
                file.write_text("Other words.")
            else:
                codes = np.load(file)
                codes[0, 0] += 1
                np.save(file, codes)
        again, rebuilt = build(data)
        assert rebuilt
        assert again.validation == before.validation
        learned = before.spans_of(before.train)
        assert all(learned.overlaps(again.spans[name]) for name in again.train)
        assert not any(learned.overlaps(again.spans[name]) for name in again.validation)


def test_names_that_checkpoints_of_earlier_versions_noted_count(tmp_path):
    manifest, _ = build(data := make_data_set(tmp_path / "voice", {"Ann": 30}))
    run = {"held_out": manifest.validation[:1], "data_dir": "/elsewhere/voice"}
    learned = learned_by(run, manifest, data)
    names = [name for name in manifest.spans if not learned.overlaps(manifest.spans[name])]
    assert names == manifest.validation[:1]
    assert not list(learned_by({**run, "data_dir": "other"}, manifest, data))


def test_a_clip_is_known_under_any_name(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 40})
    before, _ = build(data)
    for file in sorted(data.glob("Ann/clip_*"), reverse=True):  # as where earlier ones come in
        file.rename(file.with_stem(f"clip_{int(file.stem[-4:]) + 7:04d}"))
    after, _ = build(data)
    assert not set(before.validation) & set(after.validation)
    assert held_out_of(before) == held_out_of(after)


def prepare(data, seconds, count):
    """Make a dataset of one recording, cut into clips of so many seconds."""
    shutil.rmtree(data / "Ann", ignore_errors=True)
    make_data_set(data, {"Ann": count})
    rng = np.random.default_rng(count)
    for file in data.glob("Ann/*.npy"):  # other cuts have other codes
        np.save(file, rng.integers(0, 1000, (8, 9), dtype=np.int16))
    clips = [
        {"file": f"Ann/clip_{number:04d}.wav", "speaker": "Ann", "source": "talk.wav",
         "start": number * seconds - 0.2, "end": (number + 1) * seconds}
        for number in range(count)
    ]  # fmt: skip
    recordings = [{"source": "talk.wav", "speaker": "Ann", "digest": "0123abcd"}]
    summary = json.dumps({"clips": clips, "recordings": recordings})
    (data / "dataset_summary.json").write_text(summary)


def test_what_was_held_out_of_a_recording_stays_so_when_it_is_cut_anew(tmp_path):
    data = tmp_path / "voice"
    prepare(data, 4, 40)
    long, _ = build(data)
    prepare(data, 2, 80)
    short, _ = build(data)
    assert len(short.validation) == 2 * len(long.validation) == 6
    assert not long.spans_of(long.train).overlaps(
        span for name in short.validation for span in short.spans[name]
    )
    prepare(data, 4.9, 32)  # none of which lies within what was held out
    other, _ = build(data)
    assert len(other.validation) == 3


def test_what_two_clips_hold_is_not_held_out(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 30})
    before, _ = build(data)
    for name in before.validation:
        for suffix in (".wav", ".lab", ".npy"):
            shutil.copy(data / f"{name}{suffix}", data / "Ann" / f"copy of {name[4:]}{suffix}")
    after, _ = build(data)
    assert len(after.validation) == len(before.validation)
    assert not after.spans_of(after.train).overlaps(
        [span for name in after.validation for span in after.spans[name]]
    )


def test_that_every_clip_is_there_twice_is_said(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 4})
    for file in list(data.glob("Ann/*")):
        shutil.copy(file, file.with_stem(f"copy of {file.stem}"))
    manifest, _ = build(data)
    assert (len(manifest.train), manifest.validation) == (8, [])
    assert no_validation_reason(manifest).startswith("8 of 8 clips are there twice")


def test_clips_that_were_cut_out_of_another_dataset_s_are_known(tmp_path):
    first = make_data_set(tmp_path / "first", {"Ann": 2})
    record = {"codec": "", "clips": {f"Ann/clip_000{n}": [1, 1, f"digest {n}"] for n in (0, 1)}}
    write_json(first / "codes.json", record)
    second = make_data_set(tmp_path / "second", {"Ann": 3})
    recordings = [
        {"source": f"clip_000{n}.wav", "speaker": "Ann", "digest": f"digest {n}"} for n in range(3)
    ]
    clips = [
        {"file": f"Ann/clip_000{n}.wav", "speaker": "Ann", "source": f"clip_000{2 - n}.wav",
         "start": 0.2, "end": 3.1}
        for n in range(3)
    ]  # fmt: skip
    write_json(second / "dataset_summary.json", {"clips": clips, "recordings": recordings})
    for file in second.glob("Ann/*.npy"):
        np.save(file, (np.load(file) + 1) % 1000)  # levelled anew
    before, after = build(first)[0], build(second)[0]
    for learned, same in (("Ann/clip_0000", "Ann/clip_0002"), ("Ann/clip_0001", "Ann/clip_0001")):
        known = [
            name for name in after.spans if before.spans_of([learned]).overlaps(after.spans[name])
        ]
        assert known == [same]


def test_who_has_no_usable_clip_is_no_speaker(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 3, "backup": 2})
    for file in data.glob("backup/*.lab"):
        file.unlink()
    manifest, _ = build(data)
    assert manifest.speakers == ["Ann"]
    assert len(manifest.skipped) == 2


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (3, 1), (60, 3)])
def test_the_validation_split_is_a_share_but_at_least_one_of_two(tmp_path, count, held_out):
    manifest, _ = build(make_data_set(tmp_path / "voice", {"Ann": count}))
    assert (len(manifest.train), len(manifest.validation)) == (count - held_out, held_out)


def test_of_every_speaker_there_is_something_to_learn_from(tmp_path):
    speakers = {"Ann": 20, **{name: 1 + number % 2 for number, name in enumerate("bcdefghij")}}
    manifest, _ = build(make_data_set(tmp_path / "voices", speakers), validation_share=0.9)
    assert {name.split("/")[0] for name in manifest.train} == set(speakers)
    assert len(manifest.validation) > 10
    alone, _ = build(make_data_set(tmp_path / "alone", {"Ann": 1, "Bob": 1}))
    assert (len(alone.train), alone.validation) == (2, [])


@pytest.mark.parametrize(
    ("name", "action", "reason"),
    [
        ("clip_0000.lab", lambda p: p.unlink(), r"clip_0000\.lab: the transcript is missing"),
        ("clip_0000.lab", lambda p: p.write_text(" \n"), r"clip_0000\.lab: .* is empty"),
        ("clip_0000.lab", lambda p: p.write_text("(...)"), r"clip_0000\.lab: .* no letter"),
        ("clip_0000.npy", lambda p: p.unlink(), r"clip_0000\.npy: no codes; .*--extract-tokens"),
        ("clip_0000.npy", lambda p: p.write_bytes(b"x"), r"clip_0000\.npy: damaged codes"),
        ("clip_0000.npy", lambda p: np.save(p, np.zeros((4, 9), int)), "another codec"),
        ("clip_0000.npy", lambda p: np.save(p, np.full((8, 9), 1024)), r"outside 0\.\.1023"),
        ("clip_0000.npy", lambda p: np.save(p, np.zeros((8, 9))), "expected integers"),
    ],
)
def test_a_clip_that_cannot_be_used_is_left_out_and_named(tmp_path, name, action, reason):
    data = make_data_set(tmp_path / "voice", {"Ann": 4})
    action(data / "Ann" / name)
    manifest, _ = build(data)
    assert len(manifest.train) + len(manifest.validation) == 3
    assert list(manifest.skipped) == ["Ann/clip_0000"]
    assert re.search(reason, manifest.skipped["Ann/clip_0000"])


def test_a_data_set_without_any_usable_clip_is_an_error(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 2})
    for codes in data.rglob("*.npy"):
        codes.unlink()
    with pytest.raises(ValueError, match=r"no clip can be used; the first: .*no codes"):
        build(data)


def test_folders_that_are_no_data_sets_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such dataset"):
        find_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no audio files"):
        find_clips(tmp_path)
    data = make_data_set(tmp_path / "voice", {"Ann": 2})
    for transcript in data.rglob("*.lab"):
        transcript.unlink()
    with pytest.raises(ValueError, match=r"no clip has a \.lab transcript"):
        find_clips(data)


def test_two_files_with_one_transcript_are_named(tmp_path):
    data = make_data_set(tmp_path / "voice", {"Ann": 2})
    (data / "Ann" / "clip_0000.mp3").write_bytes(b"")
    with pytest.raises(ValueError, match="share one name"):
        find_clips(data)


def test_clips_made_by_hand_need_no_speaker_folder(tmp_path):
    data = make_data_set(tmp_path / "me", {"x": 2})
    for file in (data / "x").iterdir():
        file.rename(data / file.name)
    (data / "x").rmdir()
    assert {clip.speaker for clip in find_clips(data)} == {"me"}


def test_a_name_that_is_not_utf_8_is_told(tmp_path):
    data = make_data_set(tmp_path / "me", {"x": 2})
    os.rename(next(data.rglob("*.wav")), os.fsencode(data) + b"/x/caf\xe9.wav")
    with pytest.raises(ValueError, match=r"caf.\.wav: its name is not UTF-8; rename"):
        find_clips(data)


def test_a_speaker_is_one_whose_ever_accents_stand_beside_their_letters(tmp_path):
    data = make_data_set(tmp_path / "me", {"Jose\u0301": 1, "Ann": 1})
    assert {clip.speaker for clip in find_clips(data)} == {"Jos\u00e9", "Ann"}
    check_speaker("Jose\u0301", ["Jos\u00e9"])
    assert resolve_speaker("Jos\u00e9", ["Ann", "Jose\u0301"], cloned=False) == "Jose\u0301"


def test_a_shard_of_the_reference_is_read():
    samples = list(read_samples([GOLDEN / "shard.protos"]))
    assert samples[0].text == "Hello, world! This is a test."
    assert {sample.codes.shape[0] for sample in samples} == {8}
