"""The networks of Fish Speech 1.5: text to semantic codes, and codes to audio."""
