"""What a reader of the text would notice: words kept, cuts at natural places, bounds."""

import pytest

from fish_speech.text import clean_text, is_speakable, longest_speech, shortest_speech, split_text

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
    for chunk in split_text("e\u0301" * 300, max_bytes=100):
        assert chunk.startswith("e")


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


def test_a_long_text_is_cut_in_no_time_into_the_same_words():
    text = "A sentence of a very long book, which goes on. " * 2200
    chunks = split_text(text)
    assert " ".join(chunks) == text.strip()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("Hello.", 0.5), ("The year was 1984.", 2.0), ("你好，世界。", 1.5), (PROSE, 22.0)],
)
def test_an_unhurried_reading_lies_within_the_bounds(text, seconds):
    assert shortest_speech(text) < seconds < longest_speech(text)
    assert longest_speech(text) < 4 * seconds + 2


@pytest.mark.parametrize("mark", ["!", "?", "…", "。", ",", "、"])
def test_a_hundred_thousand_marks_are_cut_as_any_text(mark):
    """Quadratic work would take minutes here."""
    assert "".join(split_text(mark * 100_000 + "a")).endswith("a")
