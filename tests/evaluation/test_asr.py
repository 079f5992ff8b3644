"""Which recogniser listens, and to whom."""

import pytest

from fish_speech.audio import load_audio
from fish_speech.evaluation.asr import PocketSphinx, choose_recogniser, is_available_offline
from fish_speech.preparation.error_rates import word_errors
from tests.conftest import ROOT

ENGLISH = ["The tide had gone out, and the boats lay on the sand.", "She had not seen it before."]
OTHERS = {
    "german": "Der Fuchs springt über den Hund und die Katze war in dem Haus, das wir sahen. Dann "
    "kam ein Mann in die Stadt und fragte, wo die Post ist, aber keiner wollte es ihm sagen.",
    "spanish": "El perro come la comida en la casa de mi madre, no me lo dan para la mesa. Es de "
    "la familia de un amigo que vive con nosotros en el pueblo y va a la escuela de San Juan.",
    "russian": "Привет, мир. Как у тебя дела?",
    "numbers": "1 2 3",
}


@pytest.fixture(scope="module")
def sphinx():
    return PocketSphinx()


@pytest.fixture(autouse=True)
def no_whisper(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_it_hears_the_same_words_whatever_it_heard_before(sphinx):
    clips = [
        load_audio(ROOT / f"samples/rms_00{number}.flac", 16_000)[0][0].numpy() for number in (6, 1)
    ]
    first, second = (sphinx.transcribe(clip).text for clip in clips)
    assert word_errors("The train to the coast leaves a little before nine.", first).count <= 1
    assert sphinx.transcribe(clips[0][:0]).text == ""
    assert [sphinx.transcribe(clip).text for clip in reversed(clips)] == [second, first]


def test_english_is_told_from_other_languages(sphinx):
    assert sphinx.understands(ENGLISH)
    assert sphinx.understands(["Hello."])
    assert [name for name, text in OTHERS.items() if sphinx.understands([text])] == []


def test_texts_in_another_language_get_no_english_recogniser():
    recogniser, note = choose_recogniser([OTHERS["german"]])
    assert recogniser is None
    assert "not English" in note
    assert "--whisper-model" in note
    assert choose_recogniser(ENGLISH)[0].identity.startswith("pocketsphinx 5")


def test_a_whisper_model_at_hand_is_preferred_and_one_asked_for_must_be_had(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fish_speech.evaluation.asr.load_recogniser",
        lambda model, device: asked.append(model),
    )
    assert not is_available_offline("base")
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper/base.pt").touch()
    choose_recogniser([OTHERS["german"]])
    choose_recogniser(ENGLISH, "small")
    assert asked == ["base", "small"]
