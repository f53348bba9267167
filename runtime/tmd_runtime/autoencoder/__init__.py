"""Latents to frames and pictures to latents, in pieces."""
