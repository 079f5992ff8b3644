"""Speech from text with a trained model."""

from typing import TYPE_CHECKING, Any

from fish_speech.inference.speech import Piece, Sampling, Settings

if TYPE_CHECKING:
    from fish_speech.inference.synthesize import TextToSpeech

__all__ = ["Piece", "Sampling", "Settings", "TextToSpeech"]


def __getattr__(name: str) -> Any:
    """Import the rest when it is used: arguments are checked without PyTorch."""
    if name == "TextToSpeech":
        from fish_speech.inference.synthesize import TextToSpeech

        return TextToSpeech
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
