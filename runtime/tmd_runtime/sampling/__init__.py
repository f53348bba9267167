"""Noise to latents: the loop of each family, noise, time grids."""
