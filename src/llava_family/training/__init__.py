"""Turns models into sparse ones and prepares them for training."""

from .mole_tuning import freeze_for_mole_tuning
from .upcycling import freeze_for_moe_tuning, upcycle


__all__ = ["freeze_for_moe_tuning", "freeze_for_mole_tuning", "upcycle"]
