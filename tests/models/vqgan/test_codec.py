import json
import shutil

import pytest
import torch

from fish_speech.models.vqgan import Codec, CodecConfig, load_codec
from fish_speech.models.weights import empty_modules
from tests.conftest import GOLDEN, golden_tensors

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("codec_io.pt")


def test_the_spectrogram_equals_the_reference(codec, golden):
    torch.testing.assert_close(codec.spec_transform(golden["audio"]), golden["mel"], **TOLERANCE)


def test_a_waveform_has_the_same_spectrogram_in_a_batch_as_alone(codec, golden):
    lengths = golden["audio_lengths"]
    together = codec.spec_transform(golden["audio"], lengths)
    alone = codec.spec_transform(golden["audio"][1:, :, : lengths[1]])[0]
    torch.testing.assert_close(together[1, :, : alone.shape[1]], alone, **TOLERANCE)


def test_codes_equal_the_reference(codec, golden):
    codes, lengths = codec.encode(golden["audio"], golden["audio_lengths"])
    assert torch.equal(lengths, golden["code_lengths"])
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(codes[row, :, :length], golden["codes"][row, :, :length].long())


def test_audio_equals_the_reference(codec, golden):
    waveforms, lengths = codec.decode(golden["codes"], golden["code_lengths"])
    assert torch.equal(lengths, golden["decoded_lengths"])
    torch.testing.assert_close(waveforms, golden["decoded"], **TOLERANCE)


def test_a_batch_gives_what_its_items_give_one_by_one(codec, golden):
    together, lengths = codec.encode(golden["audio"], golden["audio_lengths"])
    decoded, _ = codec.decode(together, lengths)
    for row, (samples, length) in enumerate(
        zip(golden["audio_lengths"].tolist(), lengths.tolist(), strict=True)
    ):
        alone, _ = codec.encode(golden["audio"][row : row + 1, :, :samples])
        assert torch.equal(alone[0, :, :length], together[row, :, :length])
        waveform, _ = codec.decode(alone[:, :, :length])
        torch.testing.assert_close(
            waveform[0], decoded[row, :, : length * codec.frame_length], **TOLERANCE
        )


def test_waveforms_of_several_lengths_are_padded_and_their_codes_trimmed(codec, golden):
    lengths = golden["audio_lengths"].tolist()
    waveforms = [row[:, :length] for row, length in zip(golden["audio"], lengths, strict=True)]
    codes = codec.encode_batch([*waveforms, torch.zeros(1, 500)])
    for found, row, length in zip(codes, golden["codes"], golden["code_lengths"], strict=False):
        assert torch.equal(found, row[:, :length].long())
    assert codes[-1].shape == (8, 0)  # less than a frame


def test_a_decoder_in_bf16_sounds_the_same_and_leaves_the_codes_alone(codec_dir, golden):
    low = load_codec(codec_dir, dtype=torch.bfloat16)
    waveforms, _ = low.decode(golden["codes"], golden["code_lengths"])
    wanted = golden["decoded"]
    assert waveforms.dtype == torch.float32
    assert 0 < (waveforms - wanted).norm() < 0.02 * wanted.norm()
    assert len(waveforms.unique()) > 0.9 * wanted.unique().numel()  # no steps of rounded samples
    codes, _ = low.encode(golden["audio"], golden["audio_lengths"])
    for row, length in enumerate(golden["code_lengths"].tolist()):
        assert torch.equal(codes[row, :, :length], golden["codes"][row, :, :length].long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_decode_as_in_the_whole(codec_dir, golden, dtype):
    codec = load_codec(codec_dir, dtype=dtype)
    codes = golden["codes"]
    whole, _ = codec.decode(codes)
    state, pieces, computed = {}, [], []
    watch = lambda _, given: computed.append(given[0].shape[2])  # noqa: E731
    hook = codec.head.conv_post.register_forward_pre_hook(watch)
    for piece in codes.split([1, 2, codes.shape[2] - 3], dim=2):
        waveforms, lengths = codec.decode(piece, state=state)
        assert lengths.tolist() == [piece.shape[2] * codec.frame_length] * len(codes)
        pieces.append(waveforms)
    hook.remove()
    joined, exact = torch.cat(pieces, dim=2), dtype == torch.float32
    bounds = (
        {"atol": 1e-6, "rtol": 1e-5} if exact else {"atol": 0.02 * whole.abs().max(), "rtol": 0}
    )
    torch.testing.assert_close(joined, whole, **bounds)
    assert sum(computed) == whole.shape[2]  # the last convolution computes nothing twice
    # The state holds no more memory than it needs.
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in state.values())
    again, _ = codec.decode(codes[..., 1:3])  # without what went before
    assert not torch.allclose(again, pieces[1], atol=1e-3)


@pytest.mark.parametrize(
    "weight",
    [
        "backbone.norm.weight",
        "quantizer.downsample.1.1.pwconv2.weight",
        "quantizer.residual_fsq.rvqs.7.project_in.bias",
    ],
)
@torch.no_grad()
def test_damaged_weights_give_no_codes(codec_dir, golden, weight):
    codec = load_codec(codec_dir)
    codec.get_parameter(weight).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"codec computes .* no numbers: .*; get it again"):
        codec.encode(golden["audio"], golden["audio_lengths"])


@pytest.mark.parametrize("samples", [1, 500, 2047, 2048])
def test_very_short_audio_gives_only_whole_frames(codec, samples):
    _, lengths = codec.encode(torch.zeros(1, 1, samples))
    assert lengths.tolist() == [samples // 2048]


def test_published_sizes():
    with empty_modules():
        codec = Codec(CodecConfig())
    assert codec.frame_rate == pytest.approx(21.53, abs=0.01)
    assert codec.codebook_size == 1000
    assert codec.num_codebooks == 8
    assert 45e6 < sum(p.numel() for p in codec.parameters()) < 49e6


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: s])
def test_wrapper_and_generator_prefix(codec, codec_dir, tmp_path, wrap):
    state = torch.load(GOLDEN / "codec.pth", weights_only=True)
    prefixed = {f"generator.{key}": value for key, value in state.items()}
    torch.save(
        wrap({**prefixed, "discriminator.weight": torch.zeros(3)}),
        tmp_path / "firefly-gan-vq-other.pth",
    )
    shutil.copy(codec_dir / "codec_config.json", tmp_path)
    torch.testing.assert_close(load_codec(tmp_path).state_dict(), codec.state_dict())


def test_a_codec_that_does_not_fit_its_config_is_refused_with_both_shapes(codec_dir, tmp_path):
    shutil.copy(codec_dir / "firefly-gan-vq-golden.pth", tmp_path)
    values = json.loads((codec_dir / "codec_config.json").read_text())
    values["backbone"]["dims"] = [16, 24, 32, 64]
    (tmp_path / "codec_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"golden\.pth: .*has shape .*but the config says"):
        load_codec(tmp_path)


def test_a_config_that_can_not_be_is_one_error_that_names_file_and_field(codec_dir, tmp_path):
    shutil.copy(codec_dir / "firefly-gan-vq-golden.pth", tmp_path)
    values = json.loads((codec_dir / "codec_config.json").read_text())
    wrong = [(section, None, found) for section in values for found in (None, [1], 5, "x")]
    for section, key, size in (
        ("spec_transform", "sample_rate", 44100),
        ("backbone", "depths", [1, 1, 2, 1]),
        ("head", "resblock_dilation_sizes", [[1, 3, 5]] * 3),
        ("quantizer", "levels", [8, 5, 5, 5]),
    ):
        assert values[section][key] == size
        wrong += [(section, key, found) for found in (None, str(size), 0, -1, 1.5, True, 10**9)]
        wrong += [(section, key, found) for found in ([], [0], [None], {}, float("nan"), [[1.0]])]
    for section, key, found in (
        ("spec_transform", "hop_length", 100),
        ("spec_transform", "n_mels", 80),
        ("spec_transform", "win_length", 4096),
        ("backbone", "depths", [1, 1, 2]),
        ("head", "upsample_rates", [8, 64]),
        ("head", "resblock_kernel_sizes", [3, 7]),
    ):
        wrong.append((section, key, found))
    for section, key, found in wrong:
        changed = {**values[section], key: found} if key else found
        (tmp_path / "codec_config.json").write_text(json.dumps({**values, section: changed}))
        with pytest.raises(ValueError, match=rf"codec_config\.json: {section}.*{key or ''}"):
            load_codec(tmp_path)


def test_no_codec_or_two_are_named(codec_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no codec \(firefly-gan-vq-\*\.pth\)"):
        load_codec(tmp_path)
    for name in ("a", "b"):
        shutil.copy(
            codec_dir / "firefly-gan-vq-golden.pth", tmp_path / f"firefly-gan-vq-{name}.pth"
        )
    with pytest.raises(ValueError, match="more than one codec"):
        load_codec(tmp_path)
