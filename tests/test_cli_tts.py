"""cli_tts.py as a user meets it: files, messages, exit codes. The voice has random weights."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import cli_tts
from fish_speech.audio import save_audio
from fish_speech.files import write_text
from fish_speech.inference import Settings
from fish_speech.tokenizer import FishTokenizer
from tests.random_voice import CODEC_FILE, make_voice

ROOT = Path(cli_tts.__file__).resolve().parent
FRAMES = 40


@pytest.fixture(scope="session")
def voice(tmp_path_factory):
    return make_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test works in an empty folder, with one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def takes(monkeypatch):
    """Speech of `FRAMES` frames in place of the model's; returns the prompts it was asked for."""
    prompts = []

    def generate(model, prompt, *, generator, **_):
        prompts.append(prompt)
        yield from torch.randint(0, 1000, (FRAMES, 8), generator=generator)
        return True

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    return prompts


@pytest.fixture
def run(voice, takes):
    """Runs the command line on the random voice; returns the exit code."""

    def command(*arguments):
        return cli_tts.main([*map(str, arguments), "--model-path", str(voice)])

    return command


def stdin(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))


def files(folder="."):
    return sorted(os.fspath(path) for path in Path(folder).rglob("*") if path.is_file())


# Text in, files out


def test_a_text_becomes_the_file_asked_for(run, capsys):
    assert run("Hello there.", "-o", "deep/hello.wav") == 0
    samples, rate = soundfile.read("deep/hello.wav")
    assert (rate, len(samples)) == (8000, FRAMES * 256)
    assert np.abs(samples).max() <= 1
    out, err = capsys.readouterr()
    assert out == "deep/hello.wav\n"
    assert "1.3 s of speech in" in err
    assert "real-time factor" in err
    assert "first audio after" in err


def test_without_an_output_the_first_words_name_the_file(run):
    assert run("Hello, wide world!") == 0
    assert files() == ["output/Hello_wide_world.wav"]


def test_a_take_is_replaced_only_where_its_file_is_asked_for(run, capsys):
    assert run("Hello!") == run("Hello!", "--seed", 7) == 0
    assert capsys.readouterr().out == "output/Hello.wav\noutput/Hello-2.wav\n"
    first, second = Path("output/Hello.wav").read_bytes(), Path("output/Hello-2.wav").read_bytes()
    assert first != second
    assert run("Hello!", "--num-samples", 2) == run("Hello!", "--num-samples", 2) == 0
    names = [f"output/Hello{name}.wav" for name in ("_1", "_2", "-2_1", "-2_2")]
    assert capsys.readouterr().out.splitlines() == names
    assert run("Hello!", "--seed", 7, "-o", "output/Hello.wav") == 0
    assert Path("output/Hello.wav").read_bytes() == second


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_the_suffix_chooses_the_format(run, suffix):
    assert run("Hello.", "-o", f"a.{suffix}") == 0
    info = soundfile.info(f"a.{suffix}")
    assert info.format == {"ogg": "OGG", "mp3": "MP3"}.get(suffix, suffix.upper())
    assert info.samplerate == 8000


def test_text_comes_from_a_file_or_from_standard_input(run, monkeypatch):
    write_text("text.txt", "\ufeffHello.")
    assert run("--text-file", "text.txt", "-o", "a.wav") == 0
    stdin(monkeypatch, b"Hello.")
    assert run("-", "-o", "b.wav") == 0
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def test_a_dash_as_output_writes_wav_to_standard_output(run, capfdbinary, monkeypatch):
    assert run("Hello.", "-o", "-") == 0
    samples, rate = soundfile.read(io.BytesIO(capfdbinary.readouterr().out))
    assert (rate, len(samples)) == (8000, FRAMES * 256)
    assert files() == []


def test_samples_differ_and_the_seed_of_each_makes_it_again(run):
    assert run("Hello.", "-o", "a.wav", "--num-samples", 2, "--seed", 5) == 0
    assert run("Hello.", "-o", "b.wav", "--seed", 6) == 0
    assert Path("a_1.wav").read_bytes() != Path("a_2.wav").read_bytes()
    assert Path("a_2.wav").read_bytes() == Path("b.wav").read_bytes()


def test_a_batch_goes_on_where_it_was_and_remakes_what_has_changed(run, takes, capsys):
    write_text("lines.txt", "One.\n\nThree.\n")
    batch = ("--text-file", "lines.txt", "--batch", "-o", "takes")
    assert run(*batch) == 0
    assert {"takes/0001.wav", "takes/0003.wav"} < set(files("takes"))
    assert "1 of 3 lines without words: left out" in capsys.readouterr().err
    assert run(*batch) == 0
    assert len(takes) == 2
    assert "0 synthesized, 2 skipped (already done), 0 failed" in capsys.readouterr().err
    write_text("lines.txt", "One.\n\nThree!\n")
    assert run(*batch) == 0
    assert len(takes) == 3


def test_a_batch_is_remade_when_what_decides_the_speech_changes(
    place, voice, takes, capsys, monkeypatch
):
    shutil.copytree(voice, place / "own")
    write_text("lines.txt", "One.\nTwo.")

    def spoken(*flags):
        batch = ["--text-file", "lines.txt", "--batch", "-o", "takes", "--model-path", "own"]
        assert cli_tts.main([*batch, *flags]) == 0
        return int(capsys.readouterr().err.splitlines()[-1].split()[0])

    assert spoken() == 2
    os.utime(place / "own" / "model.pth", (1, 1))
    same = ("--retries", "2", "--device", "cpu", "--precision", "fp32")  # what is chosen anyway
    assert spoken(*same) == 0
    assert spoken("--retries", "1") == 2
    assert spoken("--retries", "1", "--precision", "bf16") == 2
    assert spoken() == 2
    for name in ("codec_config.json", "special_tokens.json"):
        with (place / "own" / name).open("a") as file:
            file.write("\n")
        assert spoken() == 2
    codec = torch.load(place / "own" / CODEC_FILE)
    torch.save({name: weight * 0.9 for name, weight in codec.items()}, place / "own" / CODEC_FILE)
    assert spoken() == 2
    monkeypatch.setattr(Settings, "drawing", Settings.drawing + 1)  # a later version's
    assert spoken() == 2


def test_a_line_whose_speech_has_a_gap_is_kept_but_not_done(run, monkeypatch, capsys):
    asked = []

    def generate(model, prompt, *, generator, **_):
        asked.append(prompt)
        yield from torch.randint(0, 1000, (0 if len(asked) == 2 else FRAMES, 8))
        return True

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    write_text("lines.txt", "One long sentence, and so on. " * 7)
    batch = ("--text-file", "lines.txt", "--batch", "-o", "takes", "--retries", 0)
    assert run(*batch) == 1
    err = capsys.readouterr().err
    assert "Warning: chunk 2 of 2" in err
    assert "the model said nothing" in err
    assert Path("takes/0001.wav").exists()
    assert run(*batch) == 0
    assert "1 synthesized, 0 skipped (already done), 0 failed" in capsys.readouterr().err


@pytest.fixture
def bad_lines(monkeypatch, takes):
    """`bad_lines(error)`: lines with the word "bad" raise it."""
    from fish_speech.inference import TextToSpeech

    pieces = TextToSpeech.pieces

    def fail(error):
        def failing(self, text, *rest):
            if "bad" in text:
                raise error
            yield from pieces(self, text, *rest)

        monkeypatch.setattr(TextToSpeech, "pieces", failing)

    return fail


def test_a_line_that_needs_too_much_memory_is_told_what_to_do(run, capsys, bad_lines):
    bad_lines(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    write_text("lines.txt", "bad\nTwo.")
    assert run("--text-file", "lines.txt", "--batch", "-o", "takes") == 1
    assert "out of memory; try --quantize int8" in (err := capsys.readouterr().err)
    assert "1 synthesized, 0 skipped (already done), 1 failed" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:9"], "--device cuda:9: this machine has"),
        (["--device", "mps", "--precision", "bf16"], "--device mps: "),
        (["--device", "tpu"], "--device tpu: unknown"),
    ],
)
def test_what_the_machine_cannot_do_is_said_before_a_model_is_looked_for(
    monkeypatch, capsys, flags, message
):
    monkeypatch.setattr("fish_speech.hub.find_model", None)
    assert cli_tts.main(["Hello.", "--model-path", "1.5", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_not_utf_8_is_refused_wherever_it_comes_from(run, capsys, takes):
    assert run(os.fsdecode(b"caf\xe9 is here."), "-o", "a.wav") == 2
    assert "the text: not UTF-8" in capsys.readouterr().err


def test_a_line_that_fails_is_counted_and_the_others_are_spoken(run, capsys, bad_lines):
    bad_lines(ValueError("no such speech"))
    write_text("lines.txt", "One.\nbad\nThree.")
    assert run("--text-file", "lines.txt", "--batch", "-o", "takes") == 1
    assert "no such speech" in (err := capsys.readouterr().err)
    assert "2 synthesized, 0 skipped (already done), 1 failed" in err
    assert not Path("takes/0002.wav").exists()


def test_precision_and_quantization_still_speak(run):
    assert run("Hello.", "-o", "a.wav", "--precision", "bf16", "--quantize", "int8") == 0
    assert run("Hello.", "-o", "b.wav", "--precision", "fp32") == 0
    assert files() == ["a.wav", "b.wav"]


def test_trimmed_speech_is_shorter_by_its_silence(run, monkeypatch):
    speech = [torch.zeros(1, 8000), torch.full((1, 8000), 0.5), torch.zeros(1, 8000)]
    monkeypatch.setattr(
        "fish_speech.inference.synthesize.decode_stream",
        lambda codec, take: [(part, len(list(take)) // 3) for part in speech],
    )
    assert run("Hello.", "-o", "a.wav") == 0
    assert run("Hello.", "-o", "b.wav", "--trim-silence") == 0
    assert soundfile.info("a.wav").frames == 24000
    assert soundfile.info("b.wav").frames == 8800


# Voices


def test_a_recording_with_its_text_beside_it_is_a_reference(run, takes, capsys):
    save_audio("me.wav", torch.rand(1, 8000) - 0.5, 8000)
    assert run("Hello.", "--reference-audio", "me.wav") == 2
    assert "me.wav: what does it say?" in capsys.readouterr().err
    Path("me.lab").write_bytes("Grüße".encode("latin-1"))
    assert run("Hello.", "--reference-audio", "me.wav") == 2
    assert "me.lab: not UTF-8 text" in capsys.readouterr().err
    Path("me.lab").unlink()
    write_text("me.TXT", "My words.")
    assert run("Hello.", "--reference-audio", "me.wav") == 0
    assert run("Hello.", "--reference-audio", "me.wav", "--reference-text", "My words.") == 0
    assert run("Hello.", "--speaker", "Ann") == 0
    assert torch.equal(takes[0], takes[1])
    assert takes[0].shape[1] > takes[2].shape[1]
    assert run("Hello.", "--reference-text", "My words.") == 2
    assert run("Hello.", "--reference-audio", "none.wav", "--reference-text", "x") == 2
    assert "none.wav: no such audio file" in capsys.readouterr().err


def test_references_are_checked_before_a_model_is_looked_for(place, capsys):
    for arguments, message in (
        (["--reference-audio", "none.wav"], "none.wav: no such audio file"),
        (["--reference-text", "Words."], "0 --reference-audio, but 1 --reference-text"),
    ):
        assert cli_tts.main(["Hi.", "--model-path", "nowhere", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_reference_longer_than_the_context_is_bad_input(run, capsys):
    save_audio("long.wav", torch.rand(1, 8000 * 64) - 0.5, 8000)
    assert run("Hello.", "--reference-audio", "long.wav", "--reference-text", "Words.") == 2
    assert "the reference is too long: 64.0 s" in capsys.readouterr().err
    save_audio("long.wav", torch.rand(1, 8000 * 70) - 0.5, 8000)
    assert run("Hello.", "--reference-audio", "long.wav", "--reference-text", "Words.") == 2
    assert "long.wav: longer than the 66 s" in capsys.readouterr().err
    assert files() == ["long.wav"]


def test_a_wrong_speaker_is_refused_and_a_model_without_any_warns(place, takes, voice, capsys):
    make_voice(place / "two", speakers=["Ann", "Bob"])
    speak = ["Hello.", "--model-path", "two", "-o", "a.wav", "--speaker"]
    assert cli_tts.main([*speak, "Eve"]) == 2
    assert "'Eve' is unknown; the model knows Ann, Bob" in capsys.readouterr().err
    assert cli_tts.main([*speak, "Bob"]) == 0
    assert "Warning" not in capsys.readouterr().err
    assert cli_tts.main(["Hello.", "--model-path", str(voice), "--speaker", "Bob"]) == 0
    assert "Warning: this model lists no speakers" in capsys.readouterr().err


def test_a_model_with_speakers_is_asked_by_the_name_of_the_first(place, takes, capsys):
    make_voice(place / "two", speakers=["Ann", "Bob"])
    for output, name in (("a.wav", []), ("b.wav", ["--speaker", "Ann"])):
        assert cli_tts.main(["Hello.", "--model-path", "two", "-o", output, *name]) == 0
        said = "Speaker: Ann (the model has Ann, Bob; --speaker chooses)"
        assert (said in capsys.readouterr().err) is (not name)
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def a_model(folder, when):
    folder.mkdir(parents=True)
    for name in ("config.json", "codec_config.json", "special_tokens.json", "tokenizer.tiktoken"):
        (folder / name).write_text("{}")
    (folder / "firefly-gan-vq-fsq-8x1000-20hz-generator.pth").write_text("x")
    (folder / "model.pth").write_text("x")
    os.utime(folder / "model.pth", (when, when))


def test_the_newest_trained_voice_is_preferred_and_said_to_be(place, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", "configs")
    monkeypatch.setattr(cli_tts, "__file__", str(place / "cli_tts.py"))
    assert cli_tts.main(["--list-voices"]) == 2
    assert "no model; 'git checkout -- checkpoints/tiny'" in capsys.readouterr().err
    a_model(place / "checkpoints" / "tiny", 3e9)
    assert cli_tts.setup_fish_speech() == (place, place / "checkpoints" / "tiny")
    assert "no checkpoints/*-merged is there" in capsys.readouterr().err
    a_model(place / "checkpoints" / "old-merged", 1e9)
    a_model(place / "checkpoints" / "new-merged", 2e9)
    a_model(place / "checkpoints" / ".tmp-9-other-merged", 4e9)  # being written
    assert cli_tts.setup_fish_speech()[1].name == "new-merged"
    assert "Voice: checkpoints/new-merged (trained voice of 2033-" in capsys.readouterr().err
    assert cli_tts.setup_fish_speech("checkpoints/old-merged")[1].name == "old-merged"
    assert cli_tts.main(["--list-voices"]) == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["checkpoints/new-merged", "checkpoints/old-merged", "checkpoints/tiny"]
    write_text("checkpoints/new-merged/config.json", '{"speakers": ["Ann", "Bob"]}')
    write_text("checkpoints/old-merged/config.json", "damaged")
    assert cli_tts.main(["--list-voices"]) == 0
    listed = [line.split("\t")[2:] for line in capsys.readouterr().out.splitlines()]
    assert listed == [["speakers: Ann, Bob"], [], []]


def test_the_lines_that_the_guide_adds_prefer_a_voice(place, capsys):
    added = """
    custom_model_path = "checkpoints/my_custom_voice-merged"
    if Path(custom_model_path).exists():
        print(f"🎤 Using trained model: {custom_model_path}")
        return fish_speech_dir, Path(custom_model_path)
"""
    source = Path(cli_tts.__file__).read_text(encoding="utf-8")
    before, mark, after = source.partition("\n    # A voice of your own can be preferred here")
    edited = {"__name__": "edited", "__file__": cli_tts.__file__}
    exec(compile(before + added + mark + after, "cli_tts.py", "exec"), edited)
    a_model(place / "checkpoints" / "my_custom_voice-merged", 1e9)
    chosen = Path("checkpoints/my_custom_voice-merged")
    assert edited["setup_fish_speech"]() == (ROOT, chosen)
    assert "Using trained model" in capsys.readouterr().out


# Playing


class Loudspeaker:
    """Stands in for sounddevice: keeps the samples and says when the first ones came."""

    def __init__(self):
        self.samples, self.rate, self.heard = [], None, threading.Event()

    def OutputStream(self, samplerate, channels, dtype):
        self.rate = samplerate
        return self

    def start(self):
        pass

    def write(self, samples):
        self.heard.set()
        self.samples.append(samples[:, 0])

    stop = close = abort = start


def test_speech_is_played_before_it_is_finished_and_only_played(run, monkeypatch, capsys):
    loudspeaker = Loudspeaker()
    monkeypatch.setitem(sys.modules, "sounddevice", loudspeaker)
    heard_early = []

    def generate(model, prompt, *, generator, **_):
        codes = torch.randint(0, 1000, (FRAMES, 8), generator=generator)
        yield from codes[:20]
        heard_early.append(loudspeaker.heard.wait(timeout=10))
        yield from codes[20:]
        return True

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    assert run("Hello.", "--play") == 0
    assert heard_early == [True]
    assert len(np.concatenate(loudspeaker.samples)) == FRAMES * 256
    assert loudspeaker.rate == 8000
    assert files() == []
    assert run("Hello.", "--play", "-o", "a.wav") == 0
    assert files() == ["a.wav"]


def test_what_cannot_be_played_is_kept(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setenv("PATH", "")
    assert run("Hello.", "--play") == 0
    out, err = capsys.readouterr()
    assert "Nothing can be played here: no audio device" in err
    assert out == "output/Hello.wav\n"
    assert files() == ["output/Hello.wav"]


def test_what_cannot_be_played_may_be_tried_again(run, monkeypatch, capsys):
    def endless(model, prompt, *, max_new_tokens, generator, **_):
        yield from torch.randint(0, 1000, (max_new_tokens, 8), generator=generator)
        return False

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", endless)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setenv("PATH", "")
    assert run("Hello.", "--play", "-o", "a.wav", "--max-new-tokens", "5") == 0
    assert "did not end in 0.2 s and was cut there, after 3 tries" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", Loudspeaker())
    assert run("Hello.", "--play", "-o", "a.wav", "--max-new-tokens", "5") == 0
    said = capsys.readouterr().err
    assert "was cut there" in said
    assert "tries" not in said


def test_a_device_that_fails_is_said_while_there_is_more_to_come(run, monkeypatch, capsys):
    class Broken(Loudspeaker):
        def write(self, samples):
            self.samples.append(samples)
            raise OSError("unplugged")

    loudspeaker = Broken()
    monkeypatch.setitem(sys.modules, "sounddevice", loudspeaker)
    assert run("Hello.", "--play") == 0
    out, err = capsys.readouterr()
    assert err.count("Playing failed: unplugged") == 1
    assert out == "output/Hello.wav\n"
    assert len(loudspeaker.samples) == 1


def test_where_neither_sound_nor_file_can_be_made_nothing_is_spoken(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setenv("PATH", "")
    write_text("output", "a file where a folder should be")
    assert run("Hello.", "--play") == 1
    err = capsys.readouterr().err
    assert "output is no folder that you may write to" in err
    assert "real-time factor" not in err


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["Hello.", "--num-samples", "2"], ["output/Hello_1.wav", "output/Hello_2.wav"]),
        (["Hi.\nHi.", "--batch"], ["output/Hi._Hi/0001.wav", "output/Hi._Hi/0002.wav"]),
    ],
)
def test_each_speech_that_cannot_be_played_is_kept_in_a_file_of_its_own(
    run, monkeypatch, arguments, kept
):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setenv("PATH", "")
    assert run(*arguments, "--play") == 0
    assert files() == kept


def test_ctrl_c_while_the_end_is_heard_falls_silent_and_leaves_the_whole_file(
    run, monkeypatch, capsys
):
    silent = threading.Event()

    class Playing(Loudspeaker):
        def stop(self):  # waits for the end of what is heard
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            silent.wait(timeout=10)

        def abort(self):
            silent.set()

    monkeypatch.setitem(sys.modules, "sounddevice", Playing())
    assert run("Hello.", "--play", "-o", "a.wav") == 130
    assert silent.is_set()
    assert "Interrupted" in capsys.readouterr().err
    assert soundfile.info("a.wav").frames == FRAMES * 256
    assert files() == ["a.wav"]


def test_compiling_is_left_out_where_there_is_no_card_and_said(run, capsys):
    assert run("Hello.", "-o", "a.wav", "--device", "cpu", "--compile") == 0
    said = capsys.readouterr().err
    assert "--compile is for CUDA: left out" in said
    assert "Compiling" not in said
    assert files() == ["a.wav"]


# What can go wrong


@pytest.mark.parametrize("text", ["", "   ", "😀🎤", "?!...", "\x07\x00"])
def test_a_text_without_words_is_bad_input(run, text, capsys):
    assert run(text, "-o", "a.wav") == 2
    assert "nothing to speak" in capsys.readouterr().err
    assert files() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a text"),
        (["Hi.", "--text-file", "x"], "give either a text"),
        (["--text-file", "none.txt"], "error: none.txt: no such file or directory"),
        (["--text-file", "latin.txt"], "latin.txt: not UTF-8 text"),
        (["Hi.", "-o", "a.xyz"], "unknown audio format '.xyz'"),
        (["Hi.", "-o", "latin.txt/a.wav"], "can't be written"),
        (["Hi.", "-o", "-", "--num-samples", "2"], "'-o -' takes one speech"),
        (["Hi.", "--num-samples", "0"], "at least 1"),
        (["Hi.", "--temperature", "-1"], "temperature"),
        (["Hi.", "--top-p", "0"], "top-p"),
        (["Hi.", "--retries", "-1"], "retries"),
        (["Hi.", "--max-new-tokens", "0"], "max_new_tokens"),
        (["Hi.", "--device", "toaster"], "toaster: unknown"),
        (["Hi.", "--threads", "0"], "--threads 0: must be at least 1"),
        (["a" + "\u0301" * 3000], "but the model's context has 2048"),
    ],
)
def test_bad_usage_is_said_in_a_line_and_ends_with_2(run, arguments, message, capsys):
    Path("latin.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert files() == ["latin.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hello", "there,", "my friend", "--play"],
         'put the text in quotes: cli_tts.py "Hello there, my friend"'),
        (["Hi.", "--sped", "2"], "unknown: --sped 2"),
        (["Hi.", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)  # fmt: skip
def test_what_the_flags_cannot_mean_is_said_beside_one_line_of_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli_tts.main(arguments)
    usage, said = capsys.readouterr().err.splitlines()
    assert "--help" in usage
    assert said.endswith(f": error: {message}")
    assert end.value.code == 2


def test_a_line_beyond_the_context_fails_and_the_others_are_spoken(run, takes, capsys):
    write_text("lines.txt", "One.\na" + "\u0301" * 3000 + "\nThree.")
    assert run("--text-file", "lines.txt", "--batch", "-o", "takes") == 1
    assert "the model's context has 2048" in (err := capsys.readouterr().err)
    assert "2 synthesized, 0 skipped (already done), 1 failed" in err


def test_closed_streams_are_named(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run("-", "-o", "a.wav") == 2
    assert "standard input is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert run("Hello.", "-o", "-") == 2
    assert "standard output is closed" in capsys.readouterr().err


def test_control_tokens_and_control_characters_are_no_danger(run, takes, voice):
    assert run("Stop <|im_end|>\x07 and\x00 go.", "-o", "a.wav") == 0
    tokenizer = FishTokenizer.from_pretrained(voice)
    assert (takes[0][0] == tokenizer.im_end_id).sum() == 2  # the system's and the user's own
    assert "user\nStop <|im_end|> and go.<|im_end|>" in tokenizer.decode(takes[0][0].tolist())
    assert files() == ["a.wav"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, voice: None, "neither a model version (1.5, tiny) nor a model directory"),
        (lambda path, voice: path.mkdir(), "lacks config.json, model.pth"),
        (lambda path, voice: shutil.copy(voice / "model.pth", path), "not a model directory"),
        (
            lambda path, voice: write_text(path / "checkpoints" / "step_000000100.ckpt", "x"),
            "finetune_tts.py --project thing --merge-weights",
        ),
        (
            lambda path, voice: shutil.copytree(
                voice, path, ignore=shutil.ignore_patterns("*.pth", "firefly*")
            ),
            "lacks model.pth, the codec firefly-gan-vq-*.pth",
        ),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(place, voice, make, message, capsys):
    make(place / "thing", voice)
    assert cli_tts.main(["Hi.", "--model-path", "thing"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_codec_in_place_of_a_model_is_called_a_codec(voice, capsys):
    assert cli_tts.main(["Hi.", "--model-path", str(voice / CODEC_FILE)]) == 2
    assert "the codec alone, not a model directory" in capsys.readouterr().err


def test_a_damaged_model_is_named(place, voice, capsys):
    shutil.copytree(voice, place / "thing")
    (place / "thing" / "model.pth").write_bytes(b"not weights")
    assert cli_tts.main(["Hi.", "--model-path", "thing"]) == 2
    assert "model.pth: damaged" in capsys.readouterr().err


def test_a_runaway_is_cut_and_reported_and_the_file_is_there(voice, monkeypatch, capsys):
    def generate(model, prompt, *, max_new_tokens, **_):
        yield from torch.zeros(max_new_tokens, 8, dtype=torch.long)
        return False

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    arguments = ["Hello there.", "-o", "a.wav", "--model-path", str(voice)]
    assert cli_tts.main(arguments) == 0
    assert "did not end in 3.2 s and was cut there, after 3 tries" in capsys.readouterr().err
    assert soundfile.info("a.wav").duration < 5


def test_a_model_that_says_nothing_fails_and_writes_nothing(voice, monkeypatch, capsys):
    def generate(model, prompt, **_):
        return True
        yield

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    assert cli_tts.main(["Hello.", "-o", "a.wav", "--model-path", str(voice)]) == 1
    assert "the model said nothing" in capsys.readouterr().err
    assert files() == []


def test_interrupted_it_leaves_no_half_file(run, monkeypatch, capsys):
    def generate(model, prompt, *, generator, **_):
        yield from torch.randint(0, 1000, (20, 8), generator=generator)
        raise KeyboardInterrupt

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    write_text("a.wav", "what was there before")
    assert run("Hello.", "-o", "a.wav") == 130
    assert "Interrupted" in capsys.readouterr().err
    assert files() == ["a.wav"]
    assert Path("a.wav").read_text() == "what was there before"


def test_a_panic_of_rust_code_is_one_line(run, monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    def generate(model, prompt, **_):
        raise PanicException("duplicate indices")
        yield

    monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
    assert run("Hello.", "-o", "a.wav") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: PanicException: duplicate indices (--debug shows where)"


def test_debug_shows_where_an_error_came_from(run, capsys):
    assert run("...", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


# As a process


def test_help_loads_nothing_heavy():
    result = subprocess.run(
        [sys.executable, ROOT / "cli_tts.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--reference-audio" in result.stdout
    modules = "import sys, cli_tts; print(*sorted(sys.modules))"
    loaded = subprocess.check_output([sys.executable, "-c", modules], cwd=ROOT, text=True).split()
    assert not {"torch", "soundfile", "av", "tqdm", "omegaconf"} & set(loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        ["...", "-o", "a.wav"],
        ["Hi.", "-o", "a.xyz"],
        ["Hi.", "--temperature", "-1"],
        ["Hi.", "--reference-audio", "none.wav"],
    ],
)
def test_what_is_wrong_with_the_arguments_is_said_before_pytorch_is_loaded(arguments):
    """It takes seconds."""
    code = f"import sys, cli_tts; print(cli_tts.main({arguments!r}), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) == b"2 False\n"


def test_a_real_run_pipes_wav_and_shows_no_progress_bar_to_a_pipe(voice):
    short = ["--max-new-tokens", "8", "--retries", "0", "--temperature", "100", "--top-p", "1"]
    result = subprocess.run(
        [sys.executable, ROOT / "cli_tts.py", "-", "-o", "-", "--model-path", voice, *short],
        input=b"Hello.",
        capture_output=True,
        check=True,
    )
    assert soundfile.info(io.BytesIO(result.stdout)).frames == 8 * 256
    assert b"Warning: chunk 1 of 1 ('Hello.'): the speech did not end in 0.3 s" in result.stderr
    assert b"chunk/s" not in result.stderr


LONG = "One long sentence that takes its time, and so on. " * 500


def start(voice, place, *arguments, **options):
    """A process that is speaking hot, so that the random voice doesn't soon fall silent."""
    command = [sys.executable, ROOT / "cli_tts.py", *arguments, "--model-path", voice]
    process = subprocess.Popen(
        [*command, "--temperature", "100", "--top-p", "1"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    while not process.stderr.readline().startswith("Loaded"):
        assert process.poll() is None
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_without_a_half_file(voice, place, name):
    process = start(voice, place, LONG, "-o", "a.wav")
    process.send_signal(getattr(signal, name))
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "Interrupted; what was not finished was not written."
    assert files() == []


@pytest.mark.slow
def test_under_nohup_it_speaks_on(voice, place):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup hands it down
    try:
        process = start(voice, place, "Hello.", "-o", "a.wav")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 0
    assert files() == ["a.wav"]


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_quietly(voice, place):
    process = start(voice, place, "Hello.", "-o", "-", "--max-new-tokens", "40", "--retries", "0")
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert "pipe" not in said.lower()
    assert "Exception" not in said
