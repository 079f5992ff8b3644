"""Speech from text with a trained model."""

from fish_speech.inference.sampling import Sampling
from fish_speech.inference.speech import Piece, Settings
from fish_speech.inference.synthesize import TextToSpeech

__all__ = ["Piece", "Sampling", "Settings", "TextToSpeech"]
