"""Whose checkpoints can be converted."""

SOURCES = ("sit", "dit", "fitv2", "lightningdit", "jit")
