"""Fish Speech 1.5: the model, its data, its training and its voice."""
