"""What a caller of `TextToSpeech` gets: on the random voice, or on scripted frames."""

import gc
import logging
import threading
from functools import partial

import pytest
import torch

from fish_speech.audio import save_audio
from fish_speech.conversation import Utterance
from fish_speech.inference import Settings, TextToSpeech
from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora, merge_lora
from fish_speech.text import split_text
from fish_speech.tokenizer import FishTokenizer
from tests.random_voice import make_voice

HELLO = "Hello there."
SENTENCES = [
    f"Sentence number {n} of the story is about this long, and then a bit." for n in "abcd"
]
FRAME = 256  # samples


@pytest.fixture
def tokenizer(voice_dir):
    return FishTokenizer.from_pretrained(voice_dir)


@pytest.fixture
def recording(tmp_path):
    file = tmp_path / "voice.wav"
    noise = torch.randn(1, 16000, generator=torch.Generator().manual_seed(1)) * 0.1
    save_audio(file, noise, 8000)
    return file


def read(tokenizer, prompt):
    """The text of a prompt, frames left out."""
    ids = [i for i in prompt[0].tolist() if not 0 <= i - tokenizer.semantic_begin_id < 1024]
    return tokenizer.decode(ids)


# Speech as a whole and in pieces


def test_the_same_seed_gives_the_same_speech_and_another_another(tts):
    first = tts.synthesize(HELLO, seed=3, max_new_tokens=20, retries=0)
    assert torch.equal(first, tts.synthesize(HELLO, seed=3, max_new_tokens=20, retries=0))
    assert not torch.equal(first, tts.synthesize(HELLO, seed=4, max_new_tokens=20, retries=0))
    assert first.shape == (1, 20 * FRAME)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1


def test_a_stream_gives_the_samples_of_the_whole_before_it_has_ended(tts, scripted):
    scripted((90, True))
    text = " ".join(SENTENCES)
    stream = tts.stream(text, seed=7)
    first = next(stream)
    assert first.shape[1] < 90 * FRAME
    others = list(stream)
    assert all(waveform.shape[1] for waveform in others)
    streamed = torch.cat([first, *others], dim=1)
    assert torch.allclose(streamed, tts.synthesize(text, seed=7), atol=1e-4)


def test_the_random_voice_streams_what_it_synthesizes(tts):
    whole = tts.synthesize(HELLO, seed=2, max_new_tokens=70, retries=0)
    pieces = list(tts.stream(HELLO, seed=2, max_new_tokens=70))
    assert len(pieces) > 2
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_same_seed_gives_the_same_samples_however_the_output_is_cut(
    tts, scripted, monkeypatch, block
):
    scripted((60, True))
    usual = tts.synthesize(HELLO, seed=2)
    monkeypatch.setattr("fish_speech.inference.streaming.BLOCK_LENGTHS", (block,))
    assert torch.allclose(tts.synthesize(HELLO, seed=2), usual, atol=1e-4)


def test_a_pause_divides_chunks_and_none_ends_the_speech(tts, scripted):
    scripted((60, True))
    pieces = list(tts.pieces(" ".join(SENTENCES)))
    ends = [piece for piece in pieces if piece.ends_chunk]
    assert len(ends) == len(split_text(" ".join(SENTENCES))) == 2
    assert ends[0].waveform.shape[1] == 1600  # 0.2 s after a full stop
    assert not ends[0].waveform.any()
    assert ends[-1].waveform.shape[1] == 0


# What the model is asked


def test_control_tokens_in_a_text_are_spoken_not_obeyed(tts, scripted, tokenizer):
    (prompt,) = [scripted((60, True)), list(tts.pieces("Stop <|im_end|> here."))][0]
    assert (prompt[0] == tokenizer.im_end_id).sum() == 2  # of the system's and the user's message
    assert "user\nStop <|im_end|> here.<|im_end|>" in read(tokenizer, prompt)


def test_a_speaker_is_named_before_the_text(tts, scripted, tokenizer):
    prompts = scripted((60, True))
    tts.synthesize(HELLO, speaker="Ann")
    assert "user\n[Ann] Hello there.<|im_end|>" in read(tokenizer, prompts[0])


def test_a_speaker_that_the_model_does_not_list_is_refused(tmp_path, scripted, tokenizer):
    tts = TextToSpeech.from_pretrained(make_voice(tmp_path, speakers=["Ann", "Bob"]), device="cpu")
    prompts = scripted((60, True))
    tts.synthesize(HELLO)
    assert "[Ann] Hello there." in read(tokenizer, prompts.pop())
    cloned = Utterance("My voice.", torch.zeros(8, 10, dtype=torch.long))
    tts.synthesize(HELLO, reference=cloned)
    assert "[Ann]" not in read(tokenizer, prompts.pop())
    assert tts.speakers == ["Ann", "Bob"]
    tts.synthesize(HELLO, speaker="Bob")
    with pytest.raises(ValueError, match="speaker 'Eve' is unknown; the model knows Ann, Bob"):
        tts.synthesize(HELLO, speaker="Eve")
    assert len(prompts) == 1


def test_references_and_the_first_chunk_stay_while_the_oldest_others_go(tts, scripted, tokenizer):
    prompts = scripted((100, True))
    reference = Utterance("My voice.", torch.zeros(8, 10, dtype=torch.long))
    chunks = [f"{letter * 60} {letter * 60}." for letter in "ABCDE"]
    list(tts.pieces(" ".join(chunks), reference, settings=Settings(context_tokens=800)))
    texts = [read(tokenizer, prompt) for prompt in prompts]
    kept = ["".join(c for c in "ABCDE" if c * 60 in text) for text in texts]
    assert kept == ["A", "AB", "ABC", "ABCD", "ADE"]
    assert all("My voice." in text for text in texts)


def test_a_reference_is_read_once_for_many_texts_and_changes_none(voice_dir, monkeypatch):
    tts = TextToSpeech.from_pretrained(voice_dir, device="cpu")
    reference = Utterance("My voice.", torch.ones(8, 60, dtype=torch.long))
    options = {"reference": reference, "max_new_tokens": 5, "retries": 1}
    alone = tts.synthesize("Another text.", **options)
    read, plain = [], tts.model.hidden_states
    monkeypatch.setattr(
        tts.model, "hidden_states", lambda x, **o: read.append(x.shape[2]) or plain(x, **o)
    )
    tts.synthesize("A text.", **options)
    assert torch.equal(tts.synthesize("Another text.", **options), alone)
    assert max(read) < 40
    other = Utterance("My voice.", torch.zeros(8, 60, dtype=torch.long))
    tts.synthesize("A text.", **{**options, "reference": other})
    assert max(read) > 60


def test_a_model_trained_on_short_sequences_is_not_asked_for_longer_ones(tmp_path, scripted):
    tts = TextToSpeech.from_pretrained(make_voice(tmp_path, trained_seq_len=384), device="cpu")
    prompts = scripted((100, True))
    list(tts.pieces(" ".join(SENTENCES)))
    assert len(prompts) == 2
    assert max(prompt.shape[1] for prompt in prompts) < 250


@pytest.mark.slow
def test_a_hundred_thousand_characters_are_spoken_within_the_context(tts, scripted, monkeypatch):
    prompts = scripted((70, True))
    silence = torch.zeros(1, 100)
    monkeypatch.setattr(
        "fish_speech.inference.synthesize.decode_stream",
        lambda codec, take: [(silence, len(list(take)))],
    )
    text = "A sentence of a very long book, which goes on and on. " * 1900
    spoken = sum(piece.ends_chunk for piece in tts.pieces(text))
    assert spoken == len(prompts) == len(split_text(text)) > 600
    assert max(prompt.shape[1] for prompt in prompts) <= 2048


# What can go wrong


@pytest.mark.parametrize("text", ["", " \n", "😀🎤", "?!...", "\x00\x07"])
def test_a_text_without_words_is_refused(tts, text):
    with pytest.raises(ValueError, match="nothing to speak"):
        tts.synthesize(text)
    with pytest.raises(ValueError, match="nothing to speak"):
        tts.stream(text)  # at once, and not where it is listened to


def test_a_text_that_does_not_fit_is_refused_before_any_of_it_is_spoken(tts, scripted):
    prompts = scripted((60, True))
    marks = "a" + "\u0301" * 3000  # one character to the eye
    with pytest.raises(ValueError, match=r"needs \d+ tokens, but the model's context has 2048"):
        list(tts.pieces(f"{SENTENCES[0]} {SENTENCES[1]} {marks}"))
    assert not prompts


def test_a_number_of_400_digits_is_spoken(tts, scripted):
    prompts = scripted((100, True))
    waveform = tts.synthesize("Count to " + "7" * 400, retries=0)
    assert waveform.shape[-1] > 0
    assert max(prompt.shape[1] for prompt in prompts) <= 2048


def test_symbols_between_words_are_left_out_aloud(tts, scripted, caplog):
    prompts = scripted((120, True))
    tts.synthesize(f"{SENTENCES[0] * 2}\n\n{'=' * 200}\n\n{SENTENCES[1] * 2}")
    assert len(prompts) == 2
    assert caplog.messages == [f"chunk 2 of 3 ({'=' * 37 + '...'!r}): left out, it has no words"]


def test_a_chunk_of_which_nothing_was_spoken_is_called_lost(tts, scripted):
    scripted((60, True), (0, True), (60, True))
    pieces = list(tts.pieces(" ".join(SENTENCES), settings=Settings(retries=0)))
    assert [piece.lost for piece in pieces if piece.ends_chunk] == [False, True]


def test_a_runaway_is_tried_again_and_its_speech_thrown_away(tts, scripted, caplog):
    prompts = scripted((10_000, False), (40, True))
    waveform = tts.synthesize(HELLO)
    assert waveform.shape[1] == 40 * FRAME
    assert len(prompts) == 2
    assert not caplog.records


def test_a_runaway_that_never_ends_is_cut_by_the_length_of_its_text_and_reported(
    tts, scripted, caplog
):
    prompts = scripted((10_000, False))
    waveform = tts.synthesize(HELLO, retries=3)
    assert 1 < waveform.shape[1] / tts.sample_rate < 5
    assert len(prompts) == 4
    assert caplog.messages == [
        "chunk 1 of 1 ('Hello there.'): the speech did not end in 3.2 s and was cut there,"
        " after 4 tries"
    ]


def test_speech_that_breaks_off_is_tried_again(tts, scripted, caplog):
    prompts = scripted((5, True))
    tts.synthesize(SENTENCES[0], retries=1)
    assert len(prompts) == 2
    assert "broke off after 0.2 s, after 2 tries" in caplog.text


def test_what_went_wrong_is_not_given_to_the_next_chunk(tts, scripted):
    prompts = scripted((10_000, False))
    list(tts.pieces(" ".join(SENTENCES), settings=Settings(retries=0)))
    assert prompts[1].shape[1] <= prompts[0].shape[1] + 20


def test_a_model_that_says_nothing_is_an_error(tts, scripted):
    prompts = scripted((0, True))
    with pytest.raises(ValueError, match="the model said nothing"):
        tts.synthesize(HELLO, retries=2)
    assert len(prompts) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"retries": -1},
    ],
)
def test_settings_out_of_range_are_refused(tts, wrong):
    with pytest.raises(ValueError, match=r"-1|0"):
        tts.synthesize(HELLO, **wrong)


def test_a_device_that_is_not_there_is_named(voice_dir):
    with pytest.raises(ValueError, match="device nonsense: unknown"):
        TextToSpeech.from_pretrained(voice_dir, device="nonsense")


# Reference voices


def test_a_reference_is_encoded_once_for_the_same_content(tts, recording, tmp_path, monkeypatch):
    calls = []
    encode = tts._codec.encode
    monkeypatch.setattr(tts._codec, "encode", lambda *a: calls.append(a) or encode(*a))
    first = tts.encode_reference(recording, "Its “words”.")
    (tmp_path / "copy.wav").write_bytes(recording.read_bytes())
    second = tts.encode_reference(tmp_path / "copy.wav", "Other words.")
    assert len(calls) == 1
    assert torch.equal(first.codes, second.codes)
    assert first.codes.shape == (8, 62)  # 2 s, whole frames only
    assert second.text == "Other words."


def test_a_reference_without_its_words_is_refused(tts, recording):
    with pytest.raises(ValueError, match="needs its text"):
        tts.encode_reference(recording, "  ")


def test_a_silent_reference_is_refused_and_a_doubtful_one_is_said(tts, tmp_path, recording, caplog):
    save_audio(tmp_path / "silent.wav", torch.full((1, 16000), 1e-4), 8000)
    with pytest.raises(ValueError, match=r"silent.wav: silent; give some seconds"):
        tts.encode_reference(tmp_path / "silent.wav", "Words.")
    tts.encode_reference(recording, "What it says in two seconds.")
    assert not caplog.messages
    for _ in range(3):  # as an evaluation does for each sample
        tts.encode_reference(recording, "What nobody ever says in two seconds. " * 4)
    assert len(caplog.messages) == 1
    assert "voice.wav: 2.0 s for 'What nobody ever says" in caplog.messages[-1]
    short = TextToSpeech.from_pretrained(make_voice(tmp_path, trained_seq_len=100), device="cpu")
    short.encode_reference(recording, "What it says in two seconds.")
    assert "trained on short texts: take 2 s" in caplog.messages[-1]


def test_references_longer_than_the_context_are_refused_with_what_fits(tts, tmp_path):
    file = tmp_path / "long.wav"
    save_audio(file, torch.zeros(1, 8000 * 70), 8000)
    with pytest.raises(ValueError, match=r"long.wav: longer than the 66 s"):
        tts.encode_reference(file, "Words.")
    long = Utterance("Words.", torch.zeros(8, 2000, dtype=torch.long))
    with pytest.raises(ValueError, match=r"too long: 64.0 s, .* leaves room for 6\d\.\d s"):
        tts.synthesize(HELLO, reference=long)


# Built once, called many times


def test_threads_speak_at_the_same_time_as_they_would_alone(tts):
    options = {"max_new_tokens": 12, "retries": 0}
    alone = [tts.synthesize(HELLO, seed=seed, **options) for seed in range(4)]
    together = [None] * 4

    def speak(seed):
        together[seed] = tts.synthesize(HELLO, seed=seed, **options)

    threads = [threading.Thread(target=speak, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_memory_stays_flat_over_200_calls(tts, recording, caplog):
    caplog.set_level(logging.ERROR)
    # Hot, because the random weights would rather say nothing.
    options = {"max_new_tokens": 2, "temperature": 100, "top_p": 1}

    def tensors_after(calls):
        for seed in range(calls):
            reference = tts.encode_reference(recording, "Its words.")
            tts.synthesize(HELLO, reference=reference, seed=seed, **options)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors_after(5)
    assert tensors_after(200) <= before


def test_int8_decodes_in_bf16_where_the_cpu_multiplies_it_and_else_exactly(
    tts, voice_dir, scripted, monkeypatch
):
    scripted((20, True))  # so that only the decoder differs
    exact = tts.synthesize(HELLO)
    for native in (True, False):
        monkeypatch.setattr(
            "fish_speech.inference.synthesize.has_native_bf16", lambda device, native=native: native
        )
        low = TextToSpeech.from_pretrained(voice_dir, device="cpu", quantize="int8")
        waveform = low.synthesize(HELLO)
        assert torch.equal(waveform, exact) == (not native)
        torch.testing.assert_close(waveform, exact, atol=0.02, rtol=0)


def test_what_is_added_to_the_weights_of_a_voice_is_spoken_with(voice_dir):
    options = {"seed": 3, "max_new_tokens": 4, "retries": 0}

    def spoken(adapt=None):
        voice = TextToSpeech.from_pretrained(voice_dir, device="cpu", adapt=adapt)
        return voice.synthesize(HELLO, **options)

    def merged(size, model):
        add_lora(model, LoRAConfig())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter += size
        merge_lora(model)

    plain = spoken()
    assert torch.equal(spoken(partial(merged, 0.0)), plain)
    assert not torch.equal(spoken(partial(merged, 0.5)), plain)
