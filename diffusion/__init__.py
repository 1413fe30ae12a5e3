"""Diffusion models: the noise schedule, one function for each sampler's step, and guidance."""
