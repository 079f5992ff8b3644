"""From text to speech."""
