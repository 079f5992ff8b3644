"""Which model speaks better: metrics, intervals and a recommendation, from held-out clips."""
