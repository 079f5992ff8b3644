"""Teaching the model a voice."""
