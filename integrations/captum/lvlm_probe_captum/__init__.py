"""captum and lvlm_probe: a recorded answer as captum's forward function, and captum's attributions as methods."""

from __future__ import annotations

from lvlm_probe_captum.forwarding import Forward, forward

__all__ = ["Forward", "forward", "register"]


def register() -> None:
    """What the entry point calls: importing the module registers the explainers in it. captum is imported by them."""
    from lvlm_probe_captum import methods  # noqa: F401
