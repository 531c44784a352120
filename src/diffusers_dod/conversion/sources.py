"""Whose checkpoints can be converted."""

SOURCES = ("sit", "dit", "diffusers-dit", "fitv2")
