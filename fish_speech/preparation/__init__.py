"""Recordings in, a data set of short transcribed clips out."""

from fish_speech.preparation.pipeline import Options, prepare
from fish_speech.preparation.summary import Summary

__all__ = ["Options", "Summary", "prepare"]
