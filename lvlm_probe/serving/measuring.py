"""What an engine can do, found out by asking: each road is tried on a short answer of its own.

A road works when its numbers are those that the server gave while it generated, and change with the image. Version
numbers and documentation say neither: fields are ignored in silence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm_probe.errors import ModelMismatch, ReplayError
from lvlm_probe.images import make_baseline
from lvlm_probe.serving.checks import check_answer
from lvlm_probe.serving.forcing import Forcing
from lvlm_probe.serving.messages import Said, as_uri
from lvlm_probe.serving.roads import ROADS, NextToken, Road, Sglang, Untrue, spoken_in

if TYPE_CHECKING:
    from PIL import Image

QUESTION = "What color is the circle?"
"""Asked about the drawn image: any model has an ordinary answer to it, which is cut into tokens in one way."""
_DRAWS = 16
"""Answers after which a server that never took another token than the likeliest is taken for one that cannot."""


@dataclass(frozen=True)
class Measured:
    """Whether a road works on a server.

    Attributes:
        road: which.
        works: it does.
        difference: of its numbers to those of the server's own generation, largest, nats; ``None`` where it does not
            work.
        reason: why not, as a sentence.
    """

    road: str
    works: bool
    difference: float | None = None
    reason: str | None = None


def measured(
    said: Said,
    images: Sequence[Image.Image],
    forcing: Callable[[Road, Said], Forcing],
    *,
    roads: Sequence[Road] = ROADS,
    sglang: bool = False,
) -> list[tuple[Road, Measured]]:
    """Try the roads, best first, until one works; the exact ones of one request are all tried.

    Of an answer without log-probabilities or token ids, only those that need none are.

    Args:
        said: a short answer of the server's to ``images``.
        forcing: makes the requests of a road.
        roads: those to try, best first.
        sglang: whether the server is one of SGLang's, and the prompt was made here.
    """
    found: list[tuple[Road, Measured]] = []
    for road in roads:
        if sglang != isinstance(road, Sglang):
            continue
        if not road.every and any(one.works for _, one in found):
            break
        found.append((road, _measured(road, said, images, forcing)))
    return found


def _lacking(road: Road, said: Said) -> str | None:
    """What the server does not give of its own answer, and the road needs."""
    if road.gives != "samples" and not said.log_probs:
        return "the server answers without log-probabilities: it ignores `logprobs`"
    if road.by_ids and not said.prompt_ids:
        return "the server does not return token ids (`return_token_ids`, vLLM 0.10.2 and newer)"
    return None


def _measured(
    road: Road, said: Said, images: Sequence[Image.Image], forcing: Callable[[Road, Said], Forcing]
) -> Measured:
    if reason := _lacking(road, said):
        return Measured(road.name, False, reason=reason)
    try:
        made = forcing(road, said)
        checks = check_answer(made, images, said.log_probs)
        if isinstance(road, NextToken):
            _shuts_out_afterwards(forcing, road, said, images)
        if road.gives == "samples":
            _draws(made, images)
    except (ReplayError, ModelMismatch) as error:
        return Measured(road.name, False, reason=str(error))
    return Measured(road.name, True, difference=checks.against_generation)


def _shuts_out_afterwards(
    forcing: Callable[[Road, Said], Forcing], road: Road, said: Said, images: Sequence[Image.Image]
) -> None:
    """Check that another token than the model's gets what is left of the probability, and not all of it.

    Raises:
        Untrue: log-probabilities are taken after all other tokens are shut out, and say nothing.
    """
    likely = math.exp(said.log_probs[0])
    other = next(one for one in (*said.token_ids[1:], *said.prompt_ids) if one != said.token_ids[0])
    instead = dataclasses.replace(said, token_ids=(other, *said.token_ids[1:]))
    value = float(forcing(road, instead).score([lambda: images], [0], fresh=True)[0, 0])
    if likely + math.exp(value) > 1.01 or value > -1e-6:
        raise Untrue(
            f"the server gives a token that the model did not choose a probability of {math.exp(value):.3g}, beside "
            f"{likely:.3g} of the one it chose: it takes log-probabilities after the others are shut out"
        )


def _draws(forcing: Forcing, images: Sequence[Image.Image]) -> None:
    """Check that at temperature 2, on noise, where models are least sure, answers are not all the likeliest one.

    Raises:
        Untrue: they are: the server goes by the likeliest token whatever the temperature.
    """
    said = forcing.said
    uris = [as_uri(make_baseline(image, "noise").image) for image in images]
    path, body = forcing.road.request(said, uris, forcing.askable[0])
    body["max_tokens"] = 2 * len(said.token_ids)
    greedy = spoken_in(forcing.send(path, {**body, "temperature": 0}))
    if all(spoken_in(forcing.send(path, {**body, "temperature": 2})) == greedy for _ in range(_DRAWS)):
        raise Untrue(f"the server does not sample: {_DRAWS} answers at temperature 2 were all the likeliest one")


def drawn() -> Image.Image:
    """A small image with something to see in it: what capabilities are measured with."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (112, 112), (236, 232, 220))
    pen = ImageDraw.Draw(image)
    pen.ellipse((14, 20, 58, 64), fill=(200, 40, 40))
    pen.rectangle((62, 56, 100, 96), fill=(40, 80, 190))
    pen.polygon([(70, 12), (100, 44), (58, 40)], fill=(40, 150, 70))
    return image
