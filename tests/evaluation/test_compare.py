"""`cli_tts.py --compare` on small random models."""

import json

import pytest

import cli_tts
from fish_speech.evaluation.leaderboard import EvalSample, Leaderboard, ModelRow, SampleResult
from fish_speech.evaluation.recommend import Commands, prefer
from tests.evaluation.conftest import CLIPS, Hearing
from tests.random_voice import make_voice

TEXTS = ["Hello there.", "Good bye.", "See you."]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_voice(folder / "one/me"), make_voice(folder / "two/me", speakers=["Ann"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the texts; the recogniser takes no time, speech is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fish_speech.evaluation.project.choose_recogniser", lambda *a: (Hearing(), None)
    )
    monkeypatch.setattr("fish_speech.inference.synthesize.max_speech_seconds", lambda text: 0.5)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path


def compare(a, b, *flags, texts="texts.txt"):
    return cli_tts.main(["--compare", str(a), str(b), "--texts", texts, *map(str, flags)])


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_two_models_are_measured_and_shown(models, place, capsys):
    assert compare(*models) == 0
    said = capsys.readouterr()
    folder = place / "output/me-against-me"
    assert said.out == "output/me-against-me/leaderboard.html\n"
    # They are alike.
    assert "Keep A: me: neither is significantly better than the other" in said.err
    board = Leaderboard.read(folder / "leaderboard.json")
    assert [row.name for row in board.rows] == ["A: me", "B: me"]
    assert [sample.text for sample in board.samples] == TEXTS
    assert board.rows[0].figures["wer"].mean > 0
    assert board.rows[0].figures["similarity"] is None  # to nobody
    for sample in board.samples:
        assert len({(folder / spoken.audio) for spoken in sample.spoken.values()}) == 2
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 6
    assert "B: me" in (folder / "leaderboard.md").read_text(encoding="utf-8")


def test_with_a_recording_voices_are_compared_and_cloned(models, place, monkeypatch):
    flags = ("--reference-audio", CLIPS[0], "-o", place / "x", "--num-samples", 2, "--seed", 5)
    assert compare(*models, *flags) == 0
    board = Leaderboard.read(place / "x/leaderboard.json")
    assert board.rows[0].figures["similarity"].n == 3  # texts, of two takes each
    assert board.rows[0].figures["similarity_referenced"].n == 3
    assert board.settings["seed"] == 5
    takes = {sample.name: sample.spoken["A: me"] for sample in board.samples}
    assert (place / "x" / takes["0001"].audio).read_bytes() != (
        place / "x" / takes["0004"].audio
    ).read_bytes()  # the same text with the next seed

    def not_again(*arguments, **more):
        raise AssertionError

    monkeypatch.setattr("fish_speech.inference.TextToSpeech.from_pretrained", not_again)
    assert compare(*models, *flags) == 0


def test_another_precision_is_spoken_anew(models, place, monkeypatch):
    from fish_speech.inference import TextToSpeech

    load, loaded = TextToSpeech.from_pretrained, []

    def counted(directory, **more):
        loaded.append(more["quantize"])
        return load(directory, **more)

    monkeypatch.setattr(TextToSpeech, "from_pretrained", counted)
    for flags in ((), (), ("--quantize", "int8")):
        assert compare(*models, "-o", "x", *flags) == 0
    assert loaded == [None, None, "int8", "int8"]


def test_a_model_that_fails_leaves_the_other(models, place, capsys):
    broken = make_voice(place / "broken")
    (broken / "model.pth").write_bytes(b"none")
    assert compare(broken, models[0], "-o", "x") == 1
    assert "Use me: broken could not be measured" in capsys.readouterr().err
    best = json.loads((place / "x/leaderboard.json").read_text())["recommendation"]
    assert best["choice"] == "me"
    assert best["next"].startswith('cli_tts.py "Hello there." --model-path ')


@pytest.mark.parametrize(
    ("models_given", "flags", "message"),
    [
        (("one/me", "nowhere"), (), "nowhere: neither a model version"),
        (("one/me", "empty"), (), "empty: "),
        (("one/me", "one/../one/me"), (), "it can't be compared with itself"),
        (("one/me", "two/me"), ("--texts", "none.txt"), "none.txt: no such file"),
        (("one/me", "two/me"), ("--texts", "empty"), "--texts empty: a folder; give a file of"),
        (("one/me", "two/me"), ("--texts", "blank.txt"), "no line has a letter or a number"),
        (("one/me", "two/me"), ("--speaker", "Bob"), "speaker 'Bob' is unknown"),
        (("one/me", "two/me"), ("-o", "blank.txt"), "blank.txt: a file; the comparison needs"),
        (("one/me", "two/me"), ("--play",), "--compare speaks --texts FILE"),
        (("one/me", "two/me"), ("--retries", 1), "no --retries"),
        (("one/me", "two/me"), ("--reference-audio", "x.wav"), "x.wav: no such audio file"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(models, place, capsys, models_given, flags, message):
    (place / "blank.txt").write_text("\n...\n")
    (place / "empty").mkdir()
    root = models[0].parents[1]
    given = [root / name if "me" in name else name for name in models_given]
    assert compare(*given, *flags) == 2
    said = last_error(capsys)
    assert said.startswith("error: ")
    assert message in said
    assert not (place / "output").exists()


def test_the_flags_go_together(models, place, capsys):
    assert cli_tts.main(["--compare", *map(str, models)]) == 2
    assert "--compare A B and --texts FILE go together" in last_error(capsys)
    assert cli_tts.main(["--texts", "texts.txt"]) == 2


@pytest.mark.parametrize(
    ("a", "b", "chosen", "reason"),
    [
        ((0.5, None), (0.1, None), "b", "fewer word errors than a (significant at 95%)"),
        ((0.1, None), (0.5, None), "a", "fewer word errors than b (significant at 95%)"),
        ((0.1, 0.6), (0.1, 0.8), "b", "more like the voice than a (significant at 95%)"),
        ((0.9, 0.6), (0.1, 0.6), "b", "fewer word errors than a (significant at 95%)"),
        ((0.1, 0.6), (0.5, 0.8), None, "b is significantly more like the voice, but"),
        ((0.9, 0.8), (0.1, 0.6), None, "a is significantly more like the voice, but"),
        ((0.1, 0.6), (0.1, 0.6), None, "neither is significantly better"),
    ],
)
def test_the_better_of_two(a, b, chosen, reason):
    samples = [
        EvalSample(str(i), f"one two three {i}", False, None, {
            name: SampleResult(None, wer + i / 100, None, similarity and similarity + i / 100)
            for name, (wer, similarity) in {"a": a, "b": b}.items()
        })
        for i in range(6)
    ]  # fmt: skip
    rows = ModelRow("a", path="pa"), ModelRow("b", path="pb")
    found = prefer(*rows, samples, Commands("speak {path}", "", "keep"))
    assert found.reason.startswith(reason)
    assert (found.verdict, found.choice) == (("use", chosen) if chosen else ("keep the base", "a"))
    assert found.next == (f"speak p{chosen}" if chosen else "keep")
    few = prefer(*rows, samples[:2], Commands("", "", ""))
    assert few.reason == "too few different texts to tell: 2"
