"""Turns models into sparse ones and prepares them for training."""

from .balance_loss import BalanceLossCallback
from .mole_tuning import freeze_for_mole_tuning
from .upcycling import freeze_for_moe_tuning, upcycle


__all__ = ["BalanceLossCallback", "freeze_for_moe_tuning", "freeze_for_mole_tuning", "upcycle"]
