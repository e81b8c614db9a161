"""Exports checkpoints as Hub repositories that hold their own code, for readers without this package."""

from .export import export_model


__all__ = ["export_model"]
