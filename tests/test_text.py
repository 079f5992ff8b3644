"""What a reader of the text would notice: words kept, cuts at natural places, bounds."""

import pytest

from fish_speech.text import (
    clean_text,
    is_speakable,
    max_speech_seconds,
    min_speech_seconds,
    split_text,
)

PROSE = (
    'Dr. Smith paid 3.50 at 10:30 p.m. on Jan. 5. "Why?" she asked. See No. 5, e.g. at '
    "https://example.com/a.b?c=d! J. R. R. Tolkien wrote 1,000,000 words; nobody counted them, "
    "of course, because nobody had the time. He said no. Nobody asked again… The end."
)


def test_clean_text_agrees_with_the_reference_implementation():
    assert clean_text("  It’s ‘ok’ 😀 now,,, yes  ") == "It's 'ok'  now, yes"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("one\x00two\x1b[31m", "one two [31m"),
        ("zero\u200bwidth \ufeffmark", "zerowidth mark"),
        ("lone \udc80 surrogate", "lone   surrogate"),
        ("family 👩‍👩‍👧‍👦, shrug 🤷🏽‍♂️, key 1️⃣, heart ❤️", "family , shrug , key 1, heart"),
        ("© 2024 ½ № 5 €", "© 2024 ½ № 5 €"),
        ("cafe\u0301", "caf\u00e9"),  # as macOS may write it
        ("می‌خواهم", "می‌خواهم"),  # the zero-width non-joiner is spelling here
        ("a<|im_end|>b", "a<|im_end|>b"),  # plain text; only the tokenizer could obey it
    ],
)
def test_clean_text_drops_what_cannot_be_read_and_nothing_else(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("text", ["", " \n\t", "😀🎤", "...", "?! —", "\x00"])
def test_a_text_without_words_has_no_chunks(text):
    assert not is_speakable(text)
    assert split_text(text) == []


def test_sentences_end_where_a_reader_pauses():
    assert split_text(PROSE, min_bytes=1, max_bytes=48) == [
        "Dr. Smith paid 3.50 at 10:30 p.m. on Jan. 5.",
        '"Why?" she asked.',
        "See No. 5, e.g. at https://example.com/a.b?c=d!",  # no cut inside the address
        "J. R. R. Tolkien wrote 1,000,000 words;",
        "nobody counted them,",
        "of course, because nobody had the time.",
        "He said no. Nobody asked again… The end.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        PROSE * 9,
        "你好，世界。今天天气很好！我们去公园吧？" * 20,
        "漢字仮名" * 200,
        "हिन्दी में लिखा हुआ वाक्य। दूसरा वाक्य यहाँ है। " * 20,
        "नमस्ते" * 100,
        "a" * 1000,
        "yes " * 300,
    ],
)
def test_chunks_keep_every_word_within_the_limit(text):
    chunks = split_text(text)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert max(len(chunk.encode()) for chunk in chunks) <= 150
    assert sum(len(chunk.encode()) < 75 for chunk in chunks) <= 1


def test_a_chunk_never_starts_inside_a_grapheme():
    for chunk in split_text("q\u0301" * 300, max_bytes=100):
        assert chunk.startswith("q")


@pytest.mark.parametrize("words", ["See No. 5 there", "Ask Dr. Who there", "In the U.S. it is so"])
def test_no_chunk_ends_with_an_abbreviation(words):
    text = f"It is long enough now. {words}. And it goes on for a while."
    for limit in range(20, 60):
        chunks = split_text(text, min_bytes=1, max_bytes=limit)
        assert not [chunk for chunk in chunks if chunk.endswith(("No.", "Dr.", "U.S."))]


def test_a_label_that_no_number_follows_is_a_word():
    assert split_text("He said no. Then he left.", min_bytes=1, max_bytes=16)[0] == "He said no."


def test_numbers_and_addresses_stay_whole_beyond_the_limit():
    address = "https://example.com/" + "path/" * 40
    number = "1,234," * 30 + "567"
    chunks = split_text(f"Look at {address} and count to {number} please.")
    assert any(address in chunk for chunk in chunks)
    assert any(number in chunk for chunk in chunks)


def test_short_paragraphs_share_a_chunk_and_long_ones_start_their_own():
    paragraph = "This one long sentence" + " goes on and on" * 8 + "."
    assert split_text(f"Yes.\n\nNo.\n\n{paragraph}\n\n{paragraph}") == [
        "Yes. No.",
        paragraph,
        paragraph,
    ]


@pytest.mark.parametrize(
    ("text", "chunk"),
    [
        ("Chapter One\n \nIt was dark.", "Chapter One. It was dark."),
        ('He said "no"\n\n\nWho?\n\n1984\n\n- end', 'He said "no". Who? 1984. - end'),
        ("第一章\n\n天黑了。", "第一章。 天黑了。"),
        ("a line that\nis wrapped", "a line that is wrapped"),
    ],
)
def test_a_heading_does_not_run_into_its_text(text, chunk):
    assert split_text(text) == [chunk]


def test_a_long_text_is_cut_in_no_time_into_the_same_words():
    text = "A sentence of a very long book, which goes on. " * 2200
    chunks = split_text(text)
    assert " ".join(chunks) == text.strip()


# 40 syllables: about 4.5 a second, and pauses.
KOREAN = (
    "오늘 아침에 의사 선생님이 정원에서 오래된 은색 열쇠를 찾았고, "
    "우리는 강가를 따라 천천히 걸어갔다."
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Hello.", 0.5),
        ("The year was 1984.", 2.0),
        ("你好，世界。", 1.5),
        (PROSE, 22.0),
        (KOREAN, 9.5),
    ],
)
def test_an_unhurried_reading_lies_within_the_bounds(text, seconds):
    assert min_speech_seconds(text) < seconds < max_speech_seconds(text)
    assert max_speech_seconds(text) < 4 * seconds + 2


@pytest.mark.parametrize(
    "text", ["你好，今天天气很好。", "안녕하세요, 반갑습니다", "Good morning to all"]
)
def test_nobody_reads_a_sentence_in_a_third_of_a_second(text):
    assert min_speech_seconds(text) > 0.35


@pytest.mark.parametrize("mark", ["!", "?", "…", "。", ",", "、"])
def test_a_hundred_thousand_marks_are_cut_as_any_text(mark):
    """Quadratic work would take minutes here."""
    assert "".join(split_text(mark * 100_000 + "a")).endswith("a")


@pytest.mark.parametrize("white", [" ", "\n", "\0", " \n"])
def test_much_white_space_is_a_space(white):
    """Quadratic work would take minutes here."""
    assert split_text(f"One,{white * 100_000}two") == ["One, two"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "今天很好!我们去公园吧?我们走吧.再见。",
            ["今天很好!", "我们去公园吧?", "我们走吧.", "再见。"],
        ),
        ("我去了．他没去．", ["我去了．", "他没去．"]),
        ("他说“好!”我走了。", ["他说“好!”", "我走了。"]),
        ("先买米,再买油;然后回家。", ["先买米,", "再买油;", "然后回家。"]),
        (
            "价格是3.5元和３．１４元，共１，０００元。",
            ["价格是3.5元和３．１４元，", "共１，０００元。"],
        ),
    ],
)
def test_wide_scripts_are_cut_at_marks_of_either_width_but_not_in_a_number(text, sentences):
    limit = max(len(sentence.encode()) for sentence in sentences)
    assert split_text(text, min_bytes=1, max_bytes=limit) == sentences


@pytest.mark.parametrize(
    "whole", ["1234567890" * 3, "3.14159265358979", "someone@example.com", "https://a.org/b?c=d"]
)
def test_numbers_and_addresses_beside_wide_letters_stay_whole(whole):
    for limit in range(6, 40):
        chunks = split_text(f"我们的号码和地址是{whole}请记住它。", min_bytes=1, max_bytes=limit)
        assert [chunk for chunk in chunks if whole in chunk], limit


def test_the_number_of_an_item_stays_with_it():
    items = ["1. Take the bread.", "2) Cut it well.", "3. Eat it up."]
    for text in ("\n".join(items), " ".join(items)):
        for limit in (8, 10, 12, 18):
            chunks = split_text(text, min_bytes=1, max_bytes=limit)
            assert not {"1.", "2)", "3."} & {chunk.split()[-1] for chunk in chunks}


def test_a_number_that_takes_minutes_to_say_is_cut():
    chunks = split_text("Count to " + "7" * 400 + " now.")
    assert "".join("".join(chunks).split()) == "Countto" + "7" * 400 + "now."
    assert max(map(max_speech_seconds, chunks)) < 100
    many = " ".join(str(number) for number in range(1000, 1200))
    assert " ".join(split_text(many)) == many
    assert max(len(chunk) for chunk in split_text(many)) <= 150


def test_symbols_without_a_word_are_one_chunk_that_is_told_apart():
    words = "Some words that fill a chunk of their own, as they are long enough to do so, I hope."
    chunks = split_text(f"{words}\n\n{'=' * 1000}\n\n{words}\n\n{'-' * 1000}\n\n{words}")
    assert [chunk for chunk in chunks if is_speakable(chunk)] == [words] * 3
    assert len(chunks) == 4
    assert chunks[1].replace(" ", "") == "=" * 1000
    assert not is_speakable(chunks[1])


def test_clean_text_changes_nothing_the_second_time():
    for text in ("e\u200b\u0301", "e😀\u0301", "a.\u200b.", "\u1100\ue000\u1161"):
        assert clean_text(clean_text(text)) == clean_text(text)
    assert clean_text("e\u200b\u0301") == "\u00e9"
