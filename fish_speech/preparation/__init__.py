"""Recordings in, a dataset of short transcribed clips out."""

from typing import TYPE_CHECKING, Any

from fish_speech.preparation.options import Options, Thresholds

if TYPE_CHECKING:
    from fish_speech.preparation.pipeline import prepare
    from fish_speech.preparation.summary import Summary

__all__ = ["Options", "Summary", "Thresholds", "prepare"]


def __getattr__(name: str) -> Any:
    """Import the rest when it is used: `--help` needs nothing but the options."""
    if name == "prepare":
        from fish_speech.preparation.pipeline import prepare

        return prepare
    if name == "Summary":
        from fish_speech.preparation.summary import Summary

        return Summary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
