"""A template plugin for lvlm_probe: one explainer, written on ``replay.log_probs`` alone."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """What the entry point calls: importing the module registers the explainer in it."""
    from lvlm_probe_template import quadrants  # noqa: F401
