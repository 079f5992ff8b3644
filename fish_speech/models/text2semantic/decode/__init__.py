"""One or a few positions at a time, as generation asks for them: packed weights and kernels."""
