"""Decoding in blocks, and the silence at both ends."""

import pytest
import torch

from fish_speech.inference.streaming import BLOCK_LENGTHS, SilenceTrimmer, decode_stream
from fish_speech.models.vqgan.firefly import CausalConv1d, CausalConvTranspose1d

RATE = 8000


def test_blocks_join_to_the_whole_decoded_at_once(tts):
    codec = tts._codec
    codes = torch.randint(0, 1000, (8, 403), generator=torch.Generator().manual_seed(0))  # [K, T]
    blocks = list(decode_stream(codec, codes.T))
    whole, _ = codec.decode(codes[None])
    assert torch.allclose(torch.cat([block for block, _ in blocks], dim=1), whole[0], atol=1e-4)
    sizes = [size for _, size in blocks]
    assert sizes[0] == BLOCK_LENGTHS[0]
    assert max(sizes) == BLOCK_LENGTHS[-1]
    assert sum(sizes) == 403


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [(1, [6, 12, 24, 48, 48, 48, 24]), (4, [6] * 4 + [12] * 4 + [24] * 4 + [48])],
)
def test_blocks_are_of_few_lengths_the_last_one_too(tts, monkeypatch, repeats, expected):
    codec, plain, lengths = tts._codec, tts._codec.decode, []
    codes = torch.randint(0, 1000, (8, 200), generator=torch.Generator().manual_seed(0))  # [K, T]
    whole, _ = plain(codes[None])
    monkeypatch.setattr(
        codec, "decode", lambda x, **more: lengths.append(x.shape[2]) or plain(x, **more)
    )
    blocks = list(decode_stream(codec, codes.T, repeats))
    assert torch.allclose(torch.cat([block for block, _ in blocks], dim=1), whole[0], atol=1e-4)
    assert sum(size for _, size in blocks) == 200
    assert lengths == expected


def test_every_block_is_computed_with_a_frames_channels_side_by_side(tts):
    """As the whole is; otherwise a CPU takes two to three repeats as long in bfloat16."""
    orders = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: orders.append((inputs[0].stride(1), output.stride(1)))
        )
        for module in tts._codec.head.modules()
        if isinstance(module, CausalConv1d | CausalConvTranspose1d)
    ]
    for _ in decode_stream(tts._codec, torch.zeros(30, 8, dtype=torch.long)):
        pass
    for hook in hooks:
        hook.remove()
    assert len(orders) == 5 * len(hooks)
    assert set(orders) == {(1, 1)}


def test_what_is_no_sound_is_not_given_out(tts, monkeypatch):
    codec, plain = tts._codec, tts._codec.decode
    spoil = [1.0, 1.0, torch.nan]
    monkeypatch.setattr(codec, "decode", lambda *x, **y: (plain(*x, **y)[0] * spoil.pop(0), None))
    blocks = decode_stream(codec, torch.zeros(30, 8, dtype=torch.long))
    next(blocks)
    next(blocks)
    with pytest.raises(ValueError, match=r"codec computes .* no numbers"):
        next(blocks)


def test_two_streams_of_one_codec_do_not_mix(tts):
    codec, generator = tts._codec, torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 1000, (8, 20), generator=generator) for _ in range(2)]  # [K, T]
    streams = [decode_stream(codec, part.T) for part in codes]
    blocks = zip(*zip(*streams, strict=True), strict=True)  # by turns
    for part, mine in zip(codes, blocks, strict=True):
        alone, _ = codec.decode(part[None])
        assert torch.allclose(torch.cat([b for b, _ in mine], dim=1), alone[0], atol=1e-4)


def test_the_first_block_comes_before_the_frames_have_ended(tts):
    made = []

    def frames():
        for _ in range(100):
            made.append(torch.zeros(8, dtype=torch.long))
            yield made[-1]

    next(decode_stream(tts._codec, frames()))
    assert len(made) == BLOCK_LENGTHS[0]


def test_silence_goes_at_both_ends_and_stays_in_the_middle():
    tone, silence = torch.full((1, RATE), 0.5), torch.zeros(1, RATE)
    trimmer = SilenceTrimmer(RATE)
    order = (silence, silence, tone, silence, silence, tone, silence, silence)
    parts = [trimmer(part) for part in order]
    margin = RATE // 20
    assert torch.cat(parts, dim=1).shape[1] == 4 * RATE + 2 * margin
    assert [part.shape[1] for part in parts[:2]] == [0, 0]


def test_sound_without_silence_is_left_alone():
    sound = torch.rand(1, 1000) + 0.1
    trimmer = SilenceTrimmer(RATE)
    assert torch.equal(torch.cat([trimmer(sound[:, :10]), trimmer(sound[:, 10:])], dim=1), sound)
