"""The causal check: does a heatmap point at what the model *uses*?

A heatmap made by masking pixels, or by gradients, says where the answer is sensitive. These functions reach into the
model instead, take away what it knows about one region of the image, and measure what that does to the answer:

* ``knockout`` cuts attention from the answer to the image tokens under the heatmap's top area (before the softmax, so
  that the rest of the row takes over the weight), layer range by layer range.
* ``patch`` replaces the features of those image tokens, as the decoder receives them, by those of another image.
* ``agreement`` makes one number per heatmap out of either: 0 as good as tokens drawn at random, 1 at best.
* ``which_parts`` shares the answer out among the prompt's images, turns or texts; ``modalities`` between image and
  question.
* ``logit_lens`` reads words off the states of image tokens, layer by layer.
* ``points`` reads any module or operation on the way, by path.

Both interventions are measured against a control of equally many image tokens. What they cannot undo: vision encoders
mix information between patches, so tokens outside a region know something about it, and a cut or a patch of the
region's own tokens leaves that alone.

Interventions are plain hooks, gone after the call. ``knockout(..., backend="nnsight")`` makes the same cut through
nnsight, to the same bits; ``points`` needs nnsight (``pip install 'lvlm-probe[causal]'``).
"""

from __future__ import annotations

from lvlm_probe.attention.cutting import cut_attention
from lvlm_probe.causal.effects import CausalEffect, Effect
from lvlm_probe.causal.interventions import agreement, knockout, patch
from lvlm_probe.causal.logit_lens import LogitLens, logit_lens
from lvlm_probe.causal.parts import Modalities, PartShares, modalities, which_parts
from lvlm_probe.causal.points import points
from lvlm_probe.causal.reasoning import Step, Steps, check_steps, find_steps
from lvlm_probe.causal.tokens import token_heat

__all__ = [
    "CausalEffect",
    "Effect",
    "LogitLens",
    "Modalities",
    "PartShares",
    "Step",
    "Steps",
    "agreement",
    "check_steps",
    "cut_attention",
    "find_steps",
    "knockout",
    "logit_lens",
    "modalities",
    "patch",
    "points",
    "token_heat",
    "which_parts",
]
