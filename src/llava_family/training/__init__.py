"""Turns models into sparse ones and prepares them for training."""

from .upcycling import freeze_for_moe_tuning, upcycle


__all__ = ["freeze_for_moe_tuning", "upcycle"]
