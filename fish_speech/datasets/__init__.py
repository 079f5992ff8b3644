"""From a folder of clips with transcripts and codes to the batches of training."""
