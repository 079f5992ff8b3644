"""Recognisers are loaded or refused in one clear line, guarded, and never asked twice."""

from __future__ import annotations

import json
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_dataset
from fish_speech.preparation import transcribe
from fish_speech.preparation.align import Word
from fish_speech.preparation.transcribe import (
    SAMPLE_RATE,
    CachedRecogniser,
    Transcription,
    hallucination_reason,
    has_repetition_loop,
    load_recogniser,
    longest_untranscribed,
)
from tests.tiny_whisper import SENTENCE, make_whisper

# Its tokenizer leaves a vocabulary file open.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


PROSE = {
    "ru": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива "
    "по-своему. Все смешалось в доме Облонских. Жена узнала, что муж был в связи с бывшею в их "
    "доме француженкою-гувернанткой, и объявила мужу, что не может жить с ним в одном доме. "
    "Положение это продолжалось уже третий день и мучительно чувствовалось и самими супругами, и "
    "всеми членами семьи, и домочадцами. Все члены семьи и домочадцы чувствовали, что нет смысла в "
    "их сожительстве и что на каждом постоялом дворе случайно сошедшиеся люди более связаны между "
    "собой, чем они, члены семьи и домочадцы Облонских. Жена не выходила из своих комнат, мужа "
    "третий день не было дома. Дети бегали по всему дому, как потерянные; англичанка поссорилась "
    "с экономкой и написала записку приятельнице, прося приискать ей новое место.",
    "hi": "आज सुबह से बहुत तेज़ बारिश हो रही है, इसलिए हम बाज़ार नहीं जा सके। मेरे दादा जी ने हमें "
    "एक पुरानी कहानी सुनाई, जिसमें एक राजा और एक किसान की मित्रता का वर्णन था। कहानी के अंत में "
    "राजा ने किसान को अपना मंत्री बना लिया और पूरे राज्य में उत्सव मनाया गया।",
    "ka": "ერთხელ, როდესაც მზე უკვე ჩადიოდა და მთებს ოქროსფერი შუქი ადგა, პატარა ბიჭი გზაზე "
    "გამოვიდა.",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗い"
    "じめじめした所でニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_whisper(tmp_path_factory.mktemp("whisper") / "one sentence.pt")


@pytest.mark.slow
def test_openai_whisper_transcribes_what_has_no_transcript(checkpoint, folder, tmp_path):
    recordings, output = folder(2, texts=False), tmp_path / "data"
    (recordings / "take 1.txt").write_text("This one has its text.")
    words = ["--input", str(recordings), "--output", str(output), "--auto-transcribe"]
    words += ["--whisper-model", str(checkpoint), "--whisper-backend", "openai"]
    words += ["--language", "en", "--device", "cpu", "--speaker", "Me"]
    assert prepare_dataset.main(words) == 0
    assert (output / "Me" / "take_0_0001.lab").read_text() == SENTENCE
    assert (output / "Me" / "take_1_0001.lab").read_text() == "This one has its text."
    (line,) = (output / ".prepared" / "heard.jsonl").read_text().splitlines()
    heard = json.loads(line)
    assert [word["text"] for word in heard["words"]] == SENTENCE.split()
    assert 0 <= heard["words"][0]["start"] < heard["words"][-1]["end"] < 4
    assert heard["no_speech"] < 0.1
    assert str(checkpoint) not in line  # the same file elsewhere is the same model


def test_a_model_that_cannot_be_downloaded_ends_in_one_line(monkeypatch, tmp_path):
    def offline(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("whisper._download", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="can't be downloaded") as caught:
        load_recogniser("base", backend="openai")
    message = str(caught.value)
    assert "/base.pt" in message
    assert str(tmp_path / "whisper") in message
    assert message.endswith("or give a checkpoint's path as --whisper-model")
    assert "\n" not in message


def test_unknown_and_broken_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--whisper-model bse: no such file, nor one of tiny\.en"):
        load_recogniser("bse", backend="openai")
    (tmp_path / "x.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"x\.pt: .*"):
        load_recogniser(str(tmp_path / "x.pt"), backend="openai")
    with pytest.raises(ValueError, match="--whisper-backend what"):
        load_recogniser("base", backend="what")


def test_an_unknown_language_is_refused(checkpoint):
    with pytest.raises(ValueError, match="--language Klingon"):
        load_recogniser(str(checkpoint), backend="openai", language="Klingon")


def test_faster_whisper_is_asked_for_its_words(monkeypatch):
    asked = {}

    class Model:
        def __init__(self, name, **how):
            asked.update(how, name=name)

        def transcribe(self, samples, **options):
            asked.update(options, length=len(samples))
            words = [SimpleNamespace(word=" Hello", start=0.5, end=1.0)]
            part = SimpleNamespace(text=" Hello", no_speech_prob=0.1, avg_logprob=-0.2, words=words)
            return iter([part]), None

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=Model))
    monkeypatch.setattr(transcribe, "find_spec", lambda name: name)
    transcription = load_recogniser("small", language="en", device="cpu").transcribe(
        np.zeros(100, np.float32)
    )
    assert transcription == Transcription("Hello", (Word("Hello", 0.5, 1.0),), 0.1)
    assert (asked["device"], asked["compute_type"]) == ("cpu", "int8")
    assert asked["language"] == "en"
    assert asked["word_timestamps"]
    assert asked["length"] == 100
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, index in (("cuda:1", 1), ("cuda", 0)):
        load_recogniser("small", device=name)
        assert (asked["device"], asked["device_index"]) == ("cuda", index)
        assert asked["compute_type"] == "float16"


def test_openai_whisper_detects_a_language_and_keeps_to_it(checkpoint, monkeypatch):
    recogniser = load_recogniser(str(checkpoint), backend="openai", device="cpu")
    second = np.ones(SAMPLE_RATE, np.float32)
    assert len(recogniser.detect_language(second)) == 2  # by its random weights
    windows = iter([{"de": 0.6, "nl": 0.4}, {"nl": 0.9, "de": 0.1}])  # of 30 s, and of one
    monkeypatch.setattr(recogniser.model, "detect_language", lambda mel: (None, next(windows)))
    assert recogniser.detect_language(np.tile(second, 31)) == "de"
    asked = {}

    def transcribe(samples, **options):
        asked.update(options)
        return {"text": "Ja.", "segments": []}

    german = recogniser.with_language("de")
    monkeypatch.setattr(recogniser.model, "transcribe", transcribe)
    german.transcribe(second)
    assert asked["language"] == "de"
    told = load_recogniser(str(checkpoint), backend="openai", language="de", device="cpu")
    assert german.identity == told.identity != recogniser.identity
    monkeypatch.setattr(type(recogniser.model), "is_multilingual", False)
    assert recogniser.detect_language(second) is None


def test_openai_whisper_computes_in_halves_on_any_card(checkpoint, monkeypatch):
    import whisper

    load, asked = whisper.load_model, []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(whisper, "load_model", lambda model, device: load(model, "cpu"))
    for device in ("cuda:1", "cuda", "cpu"):
        recogniser = load_recogniser(str(checkpoint), backend="openai", device=device)
        monkeypatch.setattr(
            recogniser.model,
            "transcribe",
            lambda samples, **how: asked.append(how["fp16"]) or {"text": "", "segments": []},
        )
        recogniser.transcribe(np.ones(SAMPLE_RATE, np.float32))
    assert asked == [True, True, False]


def test_a_missing_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(transcribe, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install faster-whisper"):
        load_recogniser("small", backend="faster", device="cpu")


@pytest.mark.parametrize(
    ("transcription", "seconds", "reason"),
    [
        (Transcription(SENTENCE), 3.5, None),
        (Transcription("昨日は雨でした。今日は晴れです。"), 3.5, None),
        (Transcription("Thank you."), 20.0, "letters a second"),
        (
            Transcription(f"{SENTENCE} Every letter in that old box tells another story."),
            2.0,
            "letters a second",
        ),
        (Transcription("♪ ..."), 3.0, "no words"),
        (Transcription("So you know, you know, you know, you know, it is."), 4.0, "repeated"),
    ],
)
def test_hallucinations_are_recognised(transcription, seconds, reason):
    found = hallucination_reason(transcription, seconds)
    assert found is None if reason is None else reason in found


def test_speech_without_a_word_is_counted_wherever_it_is():
    words = (Word("One", 3.0, 3.5), Word("two.", 3.5, 4.0), Word("Three.", 7.0, 8.0))
    regions = [(0.5, 4.0), (4.5, 6.0), (6.8, 8.3)]
    assert longest_untranscribed(Transcription("", words), regions, 9.0) == pytest.approx(2.5)
    assert longest_untranscribed(Transcription("", words[:2]), regions, 9.0) == pytest.approx(3.0)
    assert longest_untranscribed(Transcription("", words[1:]), regions, 9.0) == pytest.approx(3.0)
    assert longest_untranscribed(Transcription("Words without times."), regions, 9.0) == 0


def test_ordinary_repetition_is_no_loop():
    assert not has_repetition_loop("No, no, no, no, no! I said that I would come, and I will come.")
    assert not has_repetition_loop("to be or not to be, that is the question, to be sure")
    assert has_repetition_loop("and then we go and then we go and then we go and then we go")
    assert has_repetition_loop("ha" * 100)
    assert has_repetition_loop(
        "What he said was quite another thing, and long it was. " * 3 + "ха" * 160
    )


@pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
def test_prose_of_any_script_and_length_repeats_nothing(text):
    assert not has_repetition_loop(text)


class Counting:
    identity = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def transcribe(self, samples) -> Transcription:
        self.asked += 1
        return Transcription(f"clip {len(samples)}", (Word("clip", 0.0, 0.5),), 0.1)


def test_transcriptions_are_kept_across_runs_and_survive_a_torn_line(tmp_path):
    path, clips = tmp_path / "heard.jsonl", [np.ones(n, np.float32) for n in (3, 4, 5)]
    first = Counting()
    transcriptions = [CachedRecogniser(first, path).transcribe(clip) for clip in clips]
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # killed while it wrote the third
    second = Counting()
    assert [CachedRecogniser(second, path).transcribe(clip) for clip in clips] == transcriptions
    assert (first.asked, second.asked) == (3, 1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damaged",
    [
        *(None, [], 5, "x", {"key": [], "text": ""}),
        *({"text": None}, {"words": None}, {"words": ["clip"]}, {"words": [{"text": "clip"}]}),
        *({"words": [{"text": "clip", "start": None, "end": 1}]}, {"no_speech": None}),
    ],
)
def test_what_a_damaged_line_was_is_heard_again(tmp_path, damaged):
    path, samples = tmp_path / "heard.jsonl", np.ones(3, np.float32)
    transcription = CachedRecogniser(Counting(), path).transcribe(samples)
    good = json.loads(path.read_text())
    wrong = {**good, **damaged} if isinstance(damaged, dict) else damaged
    path.write_text(json.dumps(wrong) + "\n")
    for again in (Counting(), Counting()):
        assert CachedRecogniser(again, path).transcribe(samples) == transcription
    assert again.asked == 0  # a second time


def test_transcriptions_of_an_earlier_version_are_read(tmp_path):
    path, samples = tmp_path / "heard.jsonl", np.ones(3, np.float32)
    transcription = CachedRecogniser(Counting(), path).transcribe(samples)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "logprob": -0.3}) + "\n")
    again = Counting()
    assert CachedRecogniser(again, path).transcribe(samples) == transcription
    assert again.asked == 0


def test_another_model_is_asked_anew(tmp_path):
    samples = np.ones(3, np.float32)
    CachedRecogniser(Counting(), tmp_path / "heard.jsonl").transcribe(samples)
    other = Counting()
    other.identity = "other"
    CachedRecogniser(other, tmp_path / "heard.jsonl").transcribe(samples)
    assert other.asked == 1


def test_a_device_that_is_not_there_is_no_failed_download(checkpoint, monkeypatch):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"^--device {device}: "):
            load_recogniser(str(checkpoint), backend="openai", device=device)

    def full(*arguments, **more):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("whisper.load_model", full)
    with pytest.raises(ValueError, match="out of memory on cpu; use a smaller one"):
        load_recogniser("large", backend="openai", device="cpu")


def test_a_checkpoint_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "w.pt").write_bytes(bytes(range(256)) * 12)
    with pytest.raises(ValueError, match=r"w\.pt: not a whisper checkpoint, or damaged") as caught:
        load_recogniser(str(tmp_path / "w.pt"), backend="openai", device="cpu")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
