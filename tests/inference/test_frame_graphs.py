"""Frames by one CUDA graph; without a card Triton interprets its kernels, one after the other."""

import logging

import numpy as np
import pytest
import torch

from fish_speech.inference import TextToSpeech
from fish_speech.inference.cpu_sampling import sample_id
from fish_speech.inference.generate import (
    PrefixCache,
    _FrameDecoder,
    capture_frame_graphs,
    generate,
)
from fish_speech.inference.sampling import Sampling, probabilities
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora
from tests.conftest import golden_tensors

pytest.importorskip("triton")
from fish_speech.inference import frame_graphs
from fish_speech.models.text2semantic.decode import triton_kernels

# Lanes that are masked may divide nothing by nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IM_END = 404
SMALL = {
    "vocab_size": 60, "dim": 24, "n_layer": 2, "n_head": 3, "n_local_heads": 1, "head_dim": 8,
    "intermediate_size": 40, "codebook_size": 20, "num_codebooks": 3, "n_fast_layer": 1,
    "max_seq_len": 256, "rope_base": 1000.0,
}  # fmt: skip
GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1.3)
HOT = Sampling(temperature=1.5, top_p=0.95)


def small_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = DualARTransformer(ModelConfig(**{**SMALL, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.to(DEVICE, dtype).eval()


def prompt_of(columns):
    prompt = torch.zeros(4, columns, dtype=torch.long)
    prompt[0] = torch.arange(columns) % 30
    return prompt


def frames(model, prompt, count=4, seed=1, im_end_id=0, **options):
    """All frames [K, T] on the CPU, and whether the speech ended by itself."""
    options = {"im_end_id": im_end_id, "max_new_tokens": count, "sampling": GREEDY, **options}
    generator = torch.Generator(DEVICE).manual_seed(seed)
    generation = generate(model, prompt, generator=generator, **options)
    generated = []
    while True:
        try:
            generated.append(next(generation).cpu())
        except StopIteration as end:
            return torch.stack(generated, 1) if generated else torch.zeros(0), end.value


@pytest.mark.slow
def test_the_reference_is_continued(model):
    golden = golden_tensors("generate.pt")
    case, start = golden["gen"]["greedy_rep"], golden["prompt"].shape[1]
    sampling = Sampling(temperature=0, top_p=1, repetition_penalty=case["repetition_penalty"])
    model = model.to(DEVICE)
    options = {"sampling": sampling, "graphs": capture_frame_graphs(model, IM_END)}
    got, _ = frames(model, golden["prompt"].long(), 6, im_end_id=IM_END, **options)
    assert torch.equal(got, case["sequence"][1:, start : start + 6].long())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_qkv_bias": True, "fast_dim": 16, "fast_n_head": 2, "fast_head_dim": 10},
        {"n_local_heads": 3, "tie_word_embeddings": True, "dim": 40},
    ],
    ids=["plain", "biases", "ties"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_graph_makes_the_frames_that_the_model_makes(changes, dtype):
    """A model in bf16 rounds on its way, a graph does not: its weights are the measure."""
    exact, model, plain = (small_model(dtype, **changes) for _ in range(3))
    exact.float()
    graphs = capture_frame_graphs(model, 33)
    prompt = prompt_of(9)
    with torch.inference_mode():
        wanted, cache, low = (PrefixCache(each) for each in (exact, model, plain))
        hidden, _ = wanted.prefill(prompt, 9), cache.prefill(prompt, 9)
        low.prefill(prompt, 9)
        # From the same hidden state and cache: the prompt is read in the model's own format.
        for each in (cache, low):
            each.cache.copy_prefix(wanted.cache, 9)
        decoder = _FrameDecoder(exact, 33, GREEDY, None)
        with graphs.acquire(16) as graph:
            for frame in graph.frames(cache.cache, hidden, 3, GREEDY, None):
                expected = decoder.decode(hidden)
                assert torch.equal(frame, expected.cpu())
                column = torch.cat([expected[:1] + exact.semantic_begin_id, expected])
                hidden, rounded = wanted.decode_step(column), low.decode_step(column)
            off, most = (((x - hidden).norm() / hidden.norm()) for x in (graph.hidden, rounded))
    assert off < (1e-5 if dtype == torch.float32 else most)


def test_a_long_cache_is_attended_to_in_parts(monkeypatch):
    monkeypatch.setattr(triton_kernels, "SPLITS", 4)
    monkeypatch.setattr(triton_kernels, "KV_BLOCK", 16)
    model, prompt = small_model(), prompt_of(150)  # two rounds in three parts, a piece in the last
    expected, _ = frames(model, prompt)
    graphs = capture_frame_graphs(model, 0)
    assert torch.equal(frames(model, prompt, graphs=graphs)[0], expected)


def test_the_end_of_speech_and_the_limit():
    model = small_model(n_layer=1)
    graphs = capture_frame_graphs(model, 5)
    ends, seed = {}, 0
    while len(ends) < 2:
        generated, ended = frames(
            model, prompt_of(5), 3, seed, im_end_id=5, sampling=HOT, graphs=graphs
        )
        assert ended == (generated.shape[-1] < 3)
        ends[ended], seed = generated, seed + 1
    assert ends[False].max() < 20
    assert (
        frames(model, prompt_of(254), 100, sampling=HOT, graphs=graphs)[0].shape[-1] <= 2
    )  # the context's end


def test_what_was_said_is_not_read_again(monkeypatch):
    model, prompt = small_model(), prompt_of(12)
    graphs = capture_frame_graphs(model, 0)
    said, _ = frames(model, prompt, graphs=graphs)
    later = torch.cat([prompt, torch.cat([said[:1] + model.semantic_begin_id, said]), prompt], 1)
    expected, _ = frames(model, later, graphs=graphs)
    read, plain = [], model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda x, **options: read.append(x.shape[2]) or plain(x, **options)
    )
    cache = PrefixCache(model)
    frames(model, prompt, prefix_cache=cache, graphs=graphs)
    assert torch.equal(frames(model, later, prefix_cache=cache.copy(), graphs=graphs)[0], expected)
    assert torch.equal(frames(model, prompt, prefix_cache=cache, graphs=graphs)[0], said)
    assert read == [12, 12, 1]


def test_speeches_at_a_time_do_not_meet():
    model = small_model()
    graphs = capture_frame_graphs(model, 0)
    options = {"im_end_id": 0, "max_new_tokens": 3, "sampling": HOT, "graphs": graphs}
    alone = [
        frames(model, prompt_of(7 + n), 3, n, sampling=HOT, graphs=graphs)[0] for n in range(2)
    ]
    seeded = [torch.Generator(DEVICE).manual_seed(n) for n in range(2)]
    both = [
        generate(model, prompt_of(7 + n), generator=generator, **options)
        for n, generator in enumerate(seeded)
    ]
    turns = [[next(one).cpu() for one in both] for _ in range(3)]
    for one, expected in enumerate(alone):
        assert torch.equal(torch.stack([turn[one] for turn in turns], 1), expected)
    both[0].close()
    assert torch.equal(frames(model, prompt_of(7), 3, 0, sampling=HOT, graphs=graphs)[0], alone[0])


@pytest.mark.parametrize("count", [50, 1025])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1, 1, 1),
        Sampling(0, 0.9, 1.5),
        Sampling(0.5, 0.2, 1.1, window=3),
        Sampling(1.5, 0.95, 2.0),
    ],
)
def test_it_samples_as_the_cpu_does(sampling, count):
    random = torch.Generator().manual_seed(count)
    logits = 3 * torch.randn(count, generator=random)
    codes = torch.randint(0, count, (20,), generator=random)
    codes[-1], codes[0] = logits.argmax(), logits.argsort()[-2]  # the first: never remembered
    before = codes[1:][-sampling.window :]
    for u in (1e-6, 0.2, 0.5, 0.9, 1.0):
        if sampling.temperature:
            settings = sampling.repetition_penalty, sampling.top_p, sampling.temperature
            settings = map(np.float32, settings)
            expected = sample_id(logits.numpy(), before.numpy(), *settings, u)
        else:
            expected = probabilities(logits, before, sampling).argmax()
        assert sampled(logits, codes, sampling, u) == expected


def sampled(logits, codes, sampling, u):
    """What the kernel samples for the second of two codebooks, after frames with these codes."""
    count, frame = len(logits), len(codes)
    generated = torch.zeros(frame + 1, 2, dtype=torch.int64)
    generated[:frame, 1] = codes
    settings = [sampling.repetition_penalty, sampling.top_p, sampling.temperature, sampling.window]
    table = torch.arange(float(count))[:, None].expand(count, 3).contiguous()
    given = [
        logits, generated, torch.full((frame + 1, 2), float(u)),
        torch.tensor(settings, dtype=torch.float32), torch.tensor([frame]), table,
    ]  # fmt: skip
    logits, generated, *given = (x.to(DEVICE) for x in given)
    x = torch.zeros(2, 3, device=DEVICE)
    frame_graphs.launch_sample(logits, generated, *given, x[0], x, row=1, codebooks=2, window=16)
    code = int(generated[frame, 1])
    assert x[0].tolist() == [code] * 3  # what the fast transformer reads next
    return code


def test_a_model_with_adapters_is_refused():
    model = small_model()
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="merge them first"):
        capture_frame_graphs(model, 0)


def test_where_nothing_can_be_compiled_it_says_so_and_speaks(voice_dir, monkeypatch, caplog):
    monkeypatch.setattr(
        "fish_speech.inference.synthesize.triton_unavailable_reason", lambda device: "no C compiler"
    )
    with pytest.raises(ValueError, match="compile=True: frames can't be compiled: no C compiler"):
        TextToSpeech.from_pretrained(voice_dir, device=DEVICE, compile=True)
    caplog.set_level(logging.WARNING)
    tts = TextToSpeech.from_pretrained(voice_dir, device=DEVICE)
    assert ("no C compiler" in caplog.text) == (DEVICE == "cuda")
    assert not tts.compiled
    waveform = tts.synthesize("Hello.", max_new_tokens=3, retries=0, temperature=100, top_p=1)
    assert waveform.numel()
