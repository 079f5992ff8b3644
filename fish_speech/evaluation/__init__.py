"""Which model speaks better: figures, intervals and a recommendation, from held-out clips."""
