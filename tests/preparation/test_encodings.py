"""A text is read as it was written, though it is short and nothing says in which encoding."""

from __future__ import annotations

import numpy as np
import pytest

from fish_speech.preparation import encodings


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Grüße aus Köln."),
        ("cp1252", "Où est passé l'été, mon cœur ?"),
        ("cp1252", "¿Dónde está el niño?"),
        ("cp1252", "It\u2019s a \u201cfine\u201d day \u2013 isn\u2019t it?"),
        ("cp1252", "Hej då, på återseende i kväll!"),
        ("cp1252", "Rødgrød med fløde på."),
        ("cp1252", "Não há pão à venda hoje."),
        ("cp1252", "It costs £5 \u2013 or 6 €."),
        ("cp1252", "It was 25°C outside, or 77°F, and the sun was shining."),
        ("cp1252", "El 2º día hacía 25ºC."),
        ("cp1252", "ÉCOLE PRIMAIRE"),
        ("cp1252", "ÜBUNG MACHT DEN MEISTER"),
        ("cp1252", "LES ÉTÉS"),
        ("cp1250", "Zażółć gęślą jaźń."),
        ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy."),
        ("cp1250", "Dzień dobry, jak się masz?"),
        ("cp1251", "Привет, как дела?"),
        ("cp1251", "Добрий день, як справи?"),
        ("koi8-r", "Привет, как дела?"),
        ("koi8-r", "как дела"),
        ("cp1253", "Καλημέρα, τι κάνεις σήμερα;"),
        ("cp1254", "İstanbul'da yağmur yağıyor."),
        ("cp1255", "שלום, מה שלומך היום?"),
        ("cp1256", "صباح الخير، كيف حالك اليوم؟"),
        ("gbk", "今天天气很好。"),
        ("gbk", "他说：\u201c我喜欢用Python写程序。\u201d"),
        ("big5", "今天天氣很好。"),
        ("shift_jis", "今日はいい天気ですね。"),
        ("euc_jp", "東京タワーへ行きました。"),
        ("euc_kr", "안녕하세요. 오늘 날씨가 좋네요."),
        ("mac_roman", "Où est passé l'été ?"),
        ("utf-16-le", "Hello there, how are you?"),
        ("utf-16-be", "Привет, как дела?"),
    ],
)
def test_short_texts_in_legacy_encodings_are_read_and_the_guess_is_told(encoding, text):
    read, guessed = encodings.decode(text.encode(encoding))
    assert read == text
    assert guessed is not None
    assert text.encode(guessed) == text.encode(encoding)


def test_what_is_utf_8_is_never_guessed():
    for text in ("naïve", "Ã¼ is how ü goes wrong", "日本", "null\0byte", ""):
        assert encodings.decode(text.encode()) == (text, None)


def test_a_long_text_is_judged_by_what_is_not_ascii():
    text = "All plain so far. " * 1000 + "Grüße aus Köln. " * 1000
    assert encodings.decode(text.encode("cp1252")) == (text, "cp1252")


def test_damaged_utf_8_is_not_taken_for_something_else():
    data = "Grüße aus Köln, schöne Straße, für alle Gäste.".encode()
    with pytest.raises(ValueError, match="UTF-8 with a wrong byte at 50"):
        encodings.decode(data[:50] + b"\xff" + data[50:])


def test_what_is_no_text_is_refused():
    data = np.random.default_rng(0).integers(0, 256, (50, 200), np.uint8)
    for row in data:
        with pytest.raises(ValueError, match="save it as UTF-8"):
            encodings.decode(row.tobytes())
