"""Replaced by the hub room."""

from .push import BackgroundPush


__all__ = ["BackgroundPush"]
