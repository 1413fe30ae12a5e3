"""The trainings of p2_guided.py: a diffusion model with attributes, a classifier of noisy faces."""
