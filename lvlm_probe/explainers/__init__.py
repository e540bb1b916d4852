"""Explainers: one method, one file, and ``explain``, which runs one."""

from __future__ import annotations

from lvlm_probe.explainers.explaining import Recipe, Tokens, explain, selected
from lvlm_probe.explainers.registry import Outcome, Problem, discover, methods, needs_of, register, resolve

__all__ = [
    "Outcome",
    "Problem",
    "Recipe",
    "Tokens",
    "explain",
    "methods",
    "needs_of",
    "register",
    "register_explainer",
    "resolve",
    "selected",
]

register_explainer = register
"""What ``lvlm_probe.register_explainer`` is."""

discover(__path__, __name__)
