"""The recipe of the embedded model, where it is cheap to check, and the model that it made."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fish_speech.conversation import IGNORE_INDEX, Utterance
from fish_speech.datasets.protos.stream import write_shard
from fish_speech.datasets.shards import sentence, text_data
from fish_speech.evaluation.pitch import median_and_range, pitch
from fish_speech.evaluation.speaker import SpeakerEncoder, similarity
from fish_speech.models.text2semantic import load_model
from fish_speech.models.vqgan import load_codec
from fish_speech.preparation.error_rates import normal_words
from fish_speech.tokenizer import FishTokenizer
from fish_speech.training.loss import loss_sums
from recipes.tiny import speech, train
from recipes.tiny.batches import (
    BUCKETS,
    COLUMNS,
    UNALIGNED,
    add_noise,
    batches,
    build_aligned_item,
    token_durations,
)
from recipes.tiny.codec import Trainer, codec_to_train
from recipes.tiny.corpus import read_corpus
from recipes.tiny.model import new_model, tiny_tokenizer
from recipes.tiny.muon import Muon, orthogonal
from recipes.tiny.speech import BLOCK, jobs_of
from recipes.tiny.texts import clean_sentence, collect, from_templates, spell_number
from recipes.tiny.train import (
    GUIDED_LAYERS,
    GUIDED_REACH,
    guided_attention_loss,
    hidden_states,
    lr_share,
)
from recipes.tiny.voices import (
    STRANGERS,
    VOICES,
    disguise,
    disguised_speaker,
    speak,
    trim,
    unnamed_speaker,
    voice_of,
)

NEEDS_STRANGERS = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("text2wave")),
    reason="Debian's espeak-ng and festival are not installed",
)
EVEN = np.ones(tiny_tokenizer().vocab_size)  # every token takes as long
TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"


def test_numbers_are_spelled_out():
    assert spell_number(1984) == "one thousand nine hundred eighty-four"
    assert clean_sentence("I have 21 cats (and 3 dogs).") == (
        "I have twenty-one cats and three dogs."
    )


@pytest.mark.parametrize(
    "text",
    ["Too short.", "no end of a sentence here", "See http://a.b for more.", "The FBI was here."],
)
def test_what_is_not_spoken_english_is_skipped(text):
    assert clean_sentence(text) is None


def test_texts_are_deterministic_and_held_out_ones_are_never_trained_on():
    def texts():
        drawn = from_templates(500, random.Random(3))
        return collect([*drawn, "The Same one.", "the same, one!"], held_out=100, seed=3)

    train, held_out = texts()
    assert (train, held_out) == texts()
    assert len(held_out) == 100

    def words(sentences):
        return {normal_words(sentence) for sentence in sentences}

    assert not words(train) & words(held_out)
    assert len(words(train)) == len(train)
    assert all(3 <= len(sentence.split()) <= 20 for sentence in train)


def test_speech_is_trimmed_to_50_ms_before_and_100_ms_after():
    samples = np.zeros(16000, np.float32)
    samples[4000:8000] = 0.5
    assert len(trim(samples)) == pytest.approx(800 + 4000 + 1600, abs=1)


@pytest.mark.skipif(not shutil.which("flite"), reason="Debian's flite is not installed")
def test_unnamed_voices_have_the_pitch_and_the_pace_they_were_given():
    text = "The doctor found a silver key in the garden this morning."
    for name in map(unnamed_speaker, range(3)):
        voice, spoken = voice_of(name), speak(text, name)
        median, _ = median_and_range(pitch(spoken, 16000))
        assert median == pytest.approx(voice.pitch, rel=0.1)
        assert len(speak(text, voice.flite)) / len(spoken) == pytest.approx(voice.pace, rel=0.1)


@pytest.mark.parametrize(
    ("program", "stranger"), [("espeak-ng", STRANGERS[-1]), ("text2wave", STRANGERS[0])]
)
def test_strangers_speak_like_nobody_else(program, stranger):
    if not shutil.which(program):
        pytest.skip(f"Debian's {program} is not installed")
    text = "The doctor found a silver key in the garden this morning."
    spoken, known = speak(text, stranger), speak(text, "KAL")
    assert 0.6 < len(spoken) / len(known) < 1.6
    encoder = SpeakerEncoder.from_pretrained()
    voices = [encoder.embed(samples) for samples in (spoken, known)]
    assert similarity(*voices) < 0.9


def test_a_disguise_is_another_voice_at_another_level():
    seconds = np.arange(32000) / 16000
    voice = sum(np.sin(2 * np.pi * 120 * n * seconds) / n for n in range(1, 50))
    voice = (voice / 4).astype(np.float32)
    disguises = [disguise(voice, random.Random(seed)) for seed in range(3)]
    for other in disguises:
        faster = len(voice) / len(other)
        assert 0.8 <= faster <= 1.25
        assert median_and_range(pitch(other, 16000))[0] == pytest.approx(120 * faster, rel=0.03)
        assert 0.25 < np.abs(other).max() / np.abs(voice).max() < 1.6
        assert np.abs(other).max() <= 1
        # Harmonics no longer fall as they did: the filter's.
        size = round(len(other) * 0.9)
        harmonics = np.abs(np.fft.rfft(other[:size] * np.hanning(size)))
        levels = [harmonics[round(120 * n * faster * size / 16000)] * n for n in (2, 8, 20, 40)]
        assert np.ptp(20 * np.log10(levels)) > 4
    assert len({len(other) for other in disguises}) == 3
    assert len({round(float(np.abs(other).max()), 3) for other in disguises}) == 3
    assert np.array_equal(disguise(voice, random.Random(0)), disguises[0])


@NEEDS_STRANGERS
def test_a_disguised_stranger_stays_the_same_and_is_like_no_other():
    encoder = SpeakerEncoder.from_pretrained()
    texts = ["The doctor found a silver key in the garden.", "My sister has a house by the sea."]
    first, again = (encoder.embed(speak(text, disguised_speaker(3))) for text in texts)
    others = [encoder.embed(speak(texts[0], disguised_speaker(number))) for number in range(4, 8)]
    assert similarity(first, again) > 0.05 + max(similarity(first, other) for other in others)


def test_every_known_sentence_is_spoken_by_a_named_and_by_an_unnamed_voice():
    known, unknown = "The old key was small.", "Archbishops abound in Canterbury."
    texts = [known, unknown] * BLOCK
    kinds = {kind: jobs_of(texts, BLOCK, kind) for kind in ("closed", "open", "unnamed")}
    assert {len(jobs) for jobs in kinds.values()} == {BLOCK // 2}
    assert {text for text, _ in kinds["open"]} == {unknown}
    assert {text for text, _ in kinds["unnamed"]} == {known}
    assert {speaker for _, speaker in kinds["closed"]} <= set(VOICES)
    # A voice speaks several sentences, so that one can stand before another, and of one block only.
    spoken = Counter(speaker for _, speaker in kinds["unnamed"])
    assert min(spoken.values()) > 1
    assert len(spoken) > 20
    assert not set(spoken) & {speaker for _, speaker in jobs_of(texts, 0, "unnamed")}
    strangers = Counter(speaker for _, speaker in jobs_of(texts, BLOCK, "disguised"))
    assert strangers.total() == BLOCK // 8
    assert min(strangers.values()) > 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("flite"), reason="Debian's flite is not installed")
@NEEDS_STRANGERS
def test_several_processes_speak_every_known_sentence_once(tmp_path):
    known = ["The old key was small.", "The small key was old."]
    texts = [*known, *["Archbishops abound in Canterbury."] * (BLOCK - 2), known[0]]
    (tmp_path / "train.txt").write_text("\n".join(texts))
    flags = ["--cache", str(tmp_path), "--codec", str(TINY), "--closed"]
    assert speech.main([*flags, "--processes", "2"]) == 0
    training, held_out = read_corpus(tmp_path)
    assert sorted(spoken.text for _, spoken in training) == sorted(3 * known)
    assert [spoken.text for _, spoken in held_out] == 3 * known[:1]
    assert [speaker in VOICES for speaker, _ in training].count(True) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*")}
    next(iter(before)).unlink()
    assert speech.main(flags) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*")}
    assert sum(after[path] != time for path, time in before.items()) == 1


def test_no_sentence_of_the_last_block_is_trained_on(tmp_path):
    codes = np.zeros((8, 4), np.uint16)
    for block in range(3):
        for kind, speaker in (("closed", "SLT"), ("unnamed", "unnamed-00")):
            spoken = [sentence(f"Sentence {block}.", codes)]
            shard = tmp_path / "shards" / f"{block:05d}-{kind}.protos"
            write_shard(shard, text_data(spoken, "flite", speaker))
    training, held_out = (
        {(speaker, spoken.text) for speaker, spoken in part} for part in read_corpus(tmp_path)
    )
    assert {text for _, text in training} == {"Sentence 0.", "Sentence 1."}
    assert held_out == {("SLT", "Sentence 2."), ("unnamed-00", "Sentence 2.")}


def test_a_voice_without_a_name_has_another_name_each_time_or_none():
    tokenizer = tiny_tokenizer()
    voices = [(speaker, spoken) for speaker, spoken in corpus() if speaker == "unnamed-00"]
    source = batches(voices, tokenizer, EVEN, torch.Generator().manual_seed(0))
    texts = [tokenizer.decode(row.tolist()) for _ in range(8) for row in next(source)[0][:, 0]]
    names = [re.findall(r"\[(\w+)\] Sentence", text) for text in texts]
    assert not any("unnamed" in text for text in texts)
    assert 0.1 < sum(not name for name in names) / len(names) < 0.5
    assert len({name[0] for name in names if name}) > len(names) / 3
    assert all(len(set(name)) <= 1 for name in names)  # a reference has the same


@pytest.mark.parametrize("keep_encoder", [False, True])
def test_the_codec_trains_on_from_a_model_directory(keep_encoder):
    speech = 0.1 * torch.randn(4, 1, 6400, generator=torch.Generator().manual_seed(0))
    codec = codec_to_train(TINY)
    before, _ = codec.encode(speech)
    trainer = Trainer(codec, steps=1000, keep_encoder=keep_encoder)
    trainer.step = 500  # the encoder is awake
    distances = [trainer.update(speech)[0] for _ in range(6)]
    assert distances[-1] < distances[0]
    assert torch.equal(codec.encode(speech)[0], before) == keep_encoder


def corpus(count: int = 60) -> list[tuple[str, Utterance]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            ("SLT", "KAL", "unnamed-00")[index % 3],
            Utterance(f"Sentence {index}.", torch.randint(1000, (8, 20), generator=generator)),
        )
        for index in range(count)
    ]


def test_batches_are_deterministic_and_fill_a_bucket():
    def first(seed):
        generator = torch.Generator().manual_seed(seed)
        source = batches(corpus(), tiny_tokenizer(), EVEN, generator)
        return [next(source) for _ in range(4)]

    for (tokens, labels, _), (again, _, _) in zip(first(1), first(1), strict=True):
        assert torch.equal(tokens, again)
        assert tokens.shape == labels.shape
        assert tokens.shape[2] in BUCKETS
        assert tokens.shape[0] * tokens.shape[2] == COLUMNS
    assert not torch.equal(first(1)[0][0], first(2)[0][0])


def test_noise_changes_frames_only_and_row_0_follows():
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    tokens, labels, _ = next(batches(corpus(), tokenizer, EVEN, generator, plain=True))
    noisy = add_noise(tokens, tokenizer, 0.25, generator)
    frames = tokens[:, 0] >= tokenizer.semantic_begin_id
    assert torch.equal(noisy[:, 0][~frames], tokens[:, 0][~frames])
    assert torch.equal(noisy[:, 0][frames], noisy[:, 1][frames] + tokenizer.semantic_begin_id)
    changed = (noisy != tokens)[:, 1:].transpose(1, 2)[frames].float().mean()
    assert 0.2 < changed < 0.3
    assert (labels[:, 1] != IGNORE_INDEX).sum() == frames.sum()


def test_the_alignment_walks_through_the_last_text_in_the_time_that_its_letters_take():
    tokenizer = tiny_tokenizer()
    durations = np.full(tokenizer.vocab_size, 1.0)
    durations[ord("z")] = 4.0  # as long as all the rest
    spoken = Utterance("abzcd", torch.zeros(8, 16, dtype=torch.long))
    before = Utterance("xyz", torch.zeros(8, 5, dtype=torch.long))
    item = build_aligned_item(tokenizer, spoken, [before], "A", durations)
    answer = item.alignment != UNALIGNED
    assert torch.equal(answer, item.labels[1] != IGNORE_INDEX)
    letters = tokenizer.decode(item.tokens[0, item.alignment[answer]].tolist())
    assert letters == "aabbzzzzzzzzccdd"


def test_durations_are_found_from_whole_utterances():
    generator = random.Random(0)
    lengths = {"a": 1, "b": 3, " ": 5}
    texts = ["".join(generator.choices("ab ", k=12)) for _ in range(200)]
    spoken = [torch.zeros(8, sum(lengths[c] for c in text)) for text in texts]
    corpus = [("A", Utterance(text, codes)) for text, codes in zip(texts, spoken, strict=True)]
    durations = token_durations(corpus, tiny_tokenizer())
    for letter, frames in lengths.items():
        assert durations[ord(letter)] == pytest.approx(frames, rel=0.01)


def test_the_guided_attention_loss_is_what_attention_misses_of_its_letter():
    far = 2 * GUIDED_REACH
    logits = torch.zeros(1, 4 + far, 4 + far)
    alignment = torch.full((1, 4 + far), UNALIGNED)
    alignment[0, -1] = 0  # of all columns seen, those up to the reach are near
    expected = np.log((4 + far) / (GUIDED_REACH + 1))
    assert guided_attention_loss(logits, alignment).item() == pytest.approx(expected)
    logits[0, -1, 0] = 50.0
    assert guided_attention_loss(logits, alignment).item() == pytest.approx(0.0, abs=1e-5)


def test_guided_heads_are_those_of_the_model():
    model = new_model(0).eval()
    tokens = next(batches(corpus(), tiny_tokenizer(), EVEN, torch.Generator()))[0]
    hidden, attention = hidden_states(model, tokens)
    assert torch.allclose(hidden, model.hidden_states(tokens), atol=1e-5)
    assert len(attention) == len(GUIDED_LAYERS)
    assert attention[0].shape == (len(tokens), tokens.shape[2], tokens.shape[2])


def test_losses_of_whole_batches_are_those_of_the_package(tmp_path, monkeypatch):
    tokens, labels, alignment = next(
        batches(corpus(), tiny_tokenizer(), EVEN, torch.Generator().manual_seed(0))
    )
    frames = int((labels[:, 1] != IGNORE_INDEX).sum())
    monkeypatch.setattr(train, "FAST_FRAMES", frames)
    run = train.Run(tmp_path, "cpu", seed=0, compiled=False)
    sums = loss_sums(run.model, tokens, labels)
    expected = torch.stack([sums.token / sums.tokens, sums.codebook / sums.codes])
    assert torch.allclose(run.losses(tokens, labels, alignment)[:2], expected, rtol=2e-3)


def test_muon_makes_updates_orthogonal_and_is_torch_s_in_fp32():
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((96, 32), (32, 64), (32, 64))]
    sizes = torch.linalg.svdvals(orthogonal(torch.stack(starts[1:])))
    assert 0.6 < sizes.min() < sizes.max() < 1.3
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [
        kind(matrices, lr=0.02, weight_decay=0.01)
        for kind, matrices in ((Muon, ours), (torch.optim.Muon, theirs))
    ]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, starts, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()  # theirs iterates in bf16


def test_rate_rises_and_falls():
    assert lr_share(0, 0.0) < 0.01
    assert lr_share(1000, 0.0) == pytest.approx(1.0)
    assert lr_share(1000, 1.0) == pytest.approx(0.01)


def test_embedded_model_loads_and_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 32e6
    model, codec = load_model(TINY), load_codec(TINY)
    tokenizer = FishTokenizer.from_pretrained(TINY)
    assert tokenizer.special_tokens == tiny_tokenizer().special_tokens
    assert model.config.num_codebooks == codec.num_codebooks == 8
    assert (codec.sample_rate, codec.frame_rate) == (16000, 20)
