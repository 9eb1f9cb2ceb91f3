"""Whole networks built of `sdan_fast.modules`."""

from .sdan import SDAN, BSConv, CheckpointError

__all__ = ["SDAN", "BSConv", "CheckpointError"]
