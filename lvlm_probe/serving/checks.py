"""Checks of a server's numbers before they are used: each trap that answers 200 with wrong ones ends in a sentence.

Every reply is checked where it is read (``roads``): it has to name the tokens it is about, for prompt and answer, and
to hold log-probabilities. Here stands what takes requests of its own:

* the whole image twice: by how much the same request differs from itself, which is the noise of all that follows;
* against generation: a server that shows the model another prompt, or computes another thing, differs from itself by
  more than rounding (``allowed``);
* the sum of the probabilities of the likeliest tokens: above 1 they are none (logits);
* another image: where not one token changes at all, the images do not arrive;
* of samples, which have no numbers to compare: the answer once more token by token, and another answer to another
  image;
* at the end, the whole image once more, and the server's own name: it may have been started anew with another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ModelMismatch
from lvlm_probe.files import record_of
from lvlm_probe.images import make_baseline
from lvlm_probe.serving.forcing import Forcing
from lvlm_probe.serving.generating import spoken
from lvlm_probe.serving.messages import as_uri
from lvlm_probe.serving.roads import Untrue, continued, most_probable, spoken_in
from lvlm_probe.serving.transport import Refused

if TYPE_CHECKING:
    from PIL import Image

TOLERANCE = 0.25
"""Nats between two readings of an unlikely token. In float32 they agree to 1e-5; in bfloat16, where each pass of
another shape rounds in its own way, unlikely tokens come to 0.1. Another prompt or model is nats away."""
_SURE_TOLERANCE = 0.01
"""The same of a certain one: logits that are off by δ move log P by at most 2 δ (1 − P)."""

_ROUNDING = 1e-6
"""Nats that a reading in single precision may always be off by."""
_SURE = -1e-6
"""Nats: tokens above are so certain that single precision may give them the very same number under two images."""
_LIKELIEST = 20
_NO_IMAGE = "the images do not arrive at the model (a proxy may drop them, or the model reads text only)"
_SUM = 1.01


@dataclass(frozen=True)
class Checks:
    """What was found out about an answer on a server.

    Attributes:
        original: log P(a_t) on the whole image, ``(step,)``, nats; NaN where it is not known.
        noise: by how much a second reading differs, ``(step,)``, nats; NaN where there is none.
        against_generation: largest difference to what the server gave when it said the answer, nats; ``None`` where it
            did not say it.
        likeliest_sum: largest sum of the probabilities of the 20 likeliest tokens; ``None`` where it cannot be asked.
        image_moves: largest change when the image is replaced by noise, nats; ``None`` where only the answer's change
            is known.
    """

    original: tuple[float, ...]
    noise: tuple[float, ...]
    against_generation: float | None
    likeliest_sum: float | None
    image_moves: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as ``None``."""
        return record_of(self)


def allowed(log_probs: torch.Tensor) -> torch.Tensor:
    """How far two readings of tokens may lie apart by rounding, nats, ``(step,)``."""
    return (_SURE_TOLERANCE + 2 * TOLERANCE * -torch.expm1(log_probs)).clamp(max=TOLERANCE)


def check_answer(
    forcing: Forcing,
    images: Sequence[Image.Image],
    recorded: Sequence[float] = (),
    *,
    strict: bool = True,
    likeliest: bool = True,
) -> Checks:
    """Check the numbers of an answer on its whole images.

    Args:
        forcing: the answer on the server.
        images: of its prompt.
        recorded: log P(a_t) from when it was said or recorded, ``(step,)``; empty: none.
        strict: refuse what is not like ``recorded``.
        likeliest: also look at the likeliest tokens of each position.

    Raises:
        Untrue: the numbers are not what they are taken for.
        ModelMismatch: they are not those that were recorded.
    """
    if forcing.road.gives == "samples":
        return _check_sampled(forcing, images)
    steps = _steps(forcing)
    original = forcing.score([lambda: images], fresh=True)[0]
    if bool(original.isnan().all()):
        raise Untrue(
            "not one token of the answer is among the likeliest in its place: it is an answer of another model, or to "
            "another prompt"
        )
    again = forcing.score([lambda: images], steps, fresh=True)[0]
    noise = (original - again).abs()
    worst = float(noise.nan_to_num().max())
    steady = _within(original, again)
    noise = torch.where(noise.isnan() & ~original.isnan(), worst, noise).clamp(min=_ROUNDING)
    if not steady:
        raise Untrue(
            f"the server gives the same tokens {worst:.2g} nats more or less when it is asked the same again: nothing "
            "can be measured through it (several models behind one address?)"
        )
    difference = None
    if len(recorded):
        said = torch.tensor(list(recorded), dtype=torch.float32)
        difference = largest_difference(original, said)
        if strict and not _within(original, said):
            raise ModelMismatch(
                f"the server's log-probabilities of this answer differ by up to {difference:.2g} nats from those of "
                f"when it was said, which is more than rounding: it shows the model another prompt, runs another "
                "model now, or its log-probabilities are none; strict=False replays all the same"
            )
    moved = _moved(forcing, images, original, steps)
    listed = _likeliest_sum(forcing, images) if likeliest else None
    return Checks(tuple(original.tolist()), tuple(noise.tolist()), difference, listed, moved)


def check_same(forcing: Forcing, images: Sequence[Image.Image], original: torch.Tensor) -> None:
    """Check at the end of a run that it is still the same model. Raises ``ModelMismatch``."""
    if forcing.road.gives == "samples":
        answer = _spoken(forcing, images)
        if answer != forcing.said.answer:
            raise ModelMismatch(
                f"the server now answers {answer[:80]!r}, and {forcing.said.answer[:80]!r} at the start: another model "
                "was started there meanwhile; what it answered since the last check is forgotten"
            )
        return
    again = forcing.score([lambda: images], _steps(forcing), fresh=True)[0]
    if not _within(original, again):
        difference = largest_difference(original, again)
        raise ModelMismatch(
            f"the server's log-probabilities of the whole image are {difference:.2g} nats away from those at the "
            "start: another model was started there meanwhile; what it answered since the last check is forgotten"
        )


def largest_difference(found: torch.Tensor, recorded: torch.Tensor) -> float:
    """Largest |difference|, nats, over the tokens that both have; NaN where there is none."""
    difference = (found - recorded).abs()
    there = difference[~difference.isnan()]
    return float(there.max()) if len(there) else math.nan


def _within(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two readings are the same but for rounding, on the tokens that both have, of which there are some."""
    both = ~(first.isnan() | second.isnan())
    apart = (first - second).abs()[both]
    return bool(both.any()) and bool((apart <= torch.maximum(allowed(first), allowed(second))[both]).all())


def _steps(forcing: Forcing) -> list[int] | None:
    """The tokens of a repetition: all where that is one request, else the two least certain."""
    if forcing.road.every:
        return None
    known = forcing.said.log_probs or range(0, -len(forcing.said.token_ids), -1)
    return sorted(sorted(range(len(known)), key=lambda step: known[step])[:2])


def _moved(forcing: Forcing, images: Sequence[Image.Image], original: torch.Tensor, steps: list[int] | None) -> float:
    """Largest change of a token when the image is another one. Raises ``Untrue`` where there is none at all."""
    moved = 0.0
    for kind in ("noise", "blank"):
        others = [make_baseline(image, kind).image for image in images]
        low, high = forcing.between([lambda others=others: others], steps)  # type: ignore[misc]
        moved = float(torch.maximum(low[0] - original, original - high[0]).nan_to_num().max())
        if moved > 0:
            return moved
    if bool((original < _SURE).any()):
        raise Untrue(
            "not one token of the answer changes when the image is replaced by noise, or by black: " + _NO_IMAGE
        )
    return moved


def _check_sampled(forcing: Forcing, images: Sequence[Image.Image]) -> Checks:
    """Check, without any numbers, that the answer is continued as it was said, and is an answer to the images.

    Raises:
        Untrue: it is not.
    """
    said, uris = forcing.said, [as_uri(image) for image in images]
    for step in forcing.askable:
        body = continued(said.prompt, uris, said.before(step), ask={})
        text = spoken_in(forcing.send("/v1/chat/completions", body))
        if text != said.raw[step]:
            raise Untrue(
                f"the server goes on with {text[:40]!r} after {said.before(step)[-40:]!r}, where the answer has "
                f"{said.raw[step][:40]!r}: it is another model, another prompt, or it does not continue answers; only "
                "what it says itself, greedily, can be explained by samples"
            )
    kinds = ("noise", "blank")
    if all(_spoken(forcing, [make_baseline(one, kind).image for one in images]) == said.answer for kind in kinds):
        raise Untrue("the answer is the same when the image is replaced by noise, or by black: " + _NO_IMAGE)
    unknown = (math.nan,) * len(said.token_ids)
    return Checks(unknown, unknown, None, None, None)


def _spoken(forcing: Forcing, images: Sequence[Image.Image]) -> str:
    """The greedy answer to images, no longer than the answer."""
    said = forcing.said
    uris = [as_uri(image, forcing.form) for image in images]
    return spoken(forcing.send, said.prompt, uris, len(said.token_ids))[0]


def _likeliest_sum(forcing: Forcing, images: Sequence[Image.Image]) -> float | None:
    """Largest sum of probabilities at one position. Raises ``Untrue`` where that is above 1."""
    path, body = forcing.road.request(forcing.said, [as_uri(image) for image in images], 0)
    if not forcing.road.likeliest(body, _LIKELIEST):
        return None
    try:
        largest = most_probable(forcing.send(path, body), forcing.said)
    except Refused:  # it may list fewer: --max-logprobs
        return None
    if largest > _SUM:
        raise Untrue(
            f"the probabilities of the {_LIKELIEST} likeliest tokens add up to {largest:.3g}: the server returns "
            "logits or something else (vLLM: leave --logprobs-mode at raw_logprobs)"
        )
    return largest
