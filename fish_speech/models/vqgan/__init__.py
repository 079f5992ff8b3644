"""The codec: audio to semantic codes and back."""

from fish_speech.models.vqgan.codec import Codec, CodecConfig, find_codec, load_codec

__all__ = ["Codec", "CodecConfig", "find_codec", "load_codec"]
