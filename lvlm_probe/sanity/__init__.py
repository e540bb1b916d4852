"""Sanity checks: does a heatmap depend on the model and on the answer, and does it come out the same again?

Each takes the replay and the heatmap, explains again with one thing changed, and says ``passes``, ``fails`` or
``cannot say``, with the numbers and the limit (``SanityCheck``)::

    heat = probe.explain(replay)
    check = probe.sanity.weights(replay, heat, stages=4)
    print(check)                            # weights: passes: with the weights of all blocks random, …
    heat = check.attached()                 # a report shows it beside the verdict

* ``weights``: the model's weights made random. A map that stays says nothing of the model.
* ``answers``: other words in the place of the explained ones. A map that stays says nothing of the words.
* ``seeds``: other random numbers. A map that changes is chance.
* ``prompts``: other wordings of the question.
* ``stability``, ``completeness``, ``tie_share``: likeness of several maps, sums of attributions, ties.

What passes may still be wrong: deletion and insertion (``evaluate``) are the other half.
"""

from __future__ import annotations

from lvlm_probe.sanity.checks import SanityCheck, SanityStep
from lvlm_probe.sanity.random_weights import randomised, weight_blocks
from lvlm_probe.sanity.randomisation import answers, weights
from lvlm_probe.sanity.repeats import prompts, seeds
from lvlm_probe.sanity.stability import Completeness, Stability, completeness, stability, tie_share

__all__ = [
    "Completeness",
    "SanityCheck",
    "SanityStep",
    "Stability",
    "answers",
    "completeness",
    "prompts",
    "randomised",
    "seeds",
    "stability",
    "tie_share",
    "weight_blocks",
    "weights",
]
