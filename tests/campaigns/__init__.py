"""Campaigns: each promise of ``docs/promises.md``, tried many thousands of times. ``run.py`` runs them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from campaigns.tally import Campaign

__all__ = ["CAMPAIGNS"]

# In the order in which they are run: those whose figures are published first.
CAMPAIGNS: dict[str, Campaign] = {}
for _module in ("kills", "hostile", "threads", "faults", "sequences", "texts", "families"):
    for _campaign in importlib.import_module(f"campaigns.{_module}").CAMPAIGNS:
        CAMPAIGNS[_campaign.name] = _campaign
