"""One random voice for all tests of speaking, and a model that says what a test wants."""

import pytest
import torch

from fish_speech.inference import TextToSpeech
from tests.random_voice import make_voice


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def voice_dir(tmp_path_factory):
    return make_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(scope="session")
def tts(voice_dir):
    return TextToSpeech.from_pretrained(voice_dir, device="cpu")


@pytest.fixture
def scripted(monkeypatch):
    """Replaces generation: each call takes the next (frames, ended), the last one for ever.

    Returns the prompts that were asked for.
    """

    def script(*takes: tuple[int, bool]):
        prompts = []

        def generate(model, prompt, *, max_new_tokens, generator, **_):
            frames, ended = takes[min(len(prompts), len(takes) - 1)]
            prompts.append(prompt)
            codes = torch.randint(0, 1000, (frames, 8), generator=generator)
            yield from codes[:max_new_tokens]
            return ended and frames <= max_new_tokens

        monkeypatch.setattr("fish_speech.inference.synthesize.generate", generate)
        return prompts

    return script
