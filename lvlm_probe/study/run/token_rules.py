"""Token rules: what of an answer a row of a table explains (paper, §3.2 and Table 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lvlm_probe.errors import SelectionError
from lvlm_probe.extras import require
from lvlm_probe.selection import TokenSelection, select_tokens

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay


def keywords(answer: str) -> list[str]:
    """Keywords of an answer by YAKE (Campos et al., 2020), phrases of up to two words, best first: three, or a quarter
    of the words of an answer of more than ten, as the published recipe has it.

    Raises:
        ProbeError: YAKE is not installed.
    """
    yake = require("yake", extra="keywords", purpose="token selection by keywords")
    words = len(answer.split())
    top = 3 if words <= 10 else words // 4
    return [str(text) for text, _ in yake.KeywordExtractor(lan="en", n=2, top=top).extract_keywords(answer)]


def tokens_by(rule: str, replay: Replay, *, alpha: float) -> TokenSelection:
    """The tokens that a rule selects.

    Args:
        rule: ``"llr"`` (Eq. 6), ``"joint"`` (all), or ``"keywords"`` (all occurrences of each).
        alpha: Threshold of the log-likelihood ratio in nats.

    Raises:
        SelectionError: YAKE finds no keyword.
    """
    if rule == "keywords":
        answer = "".join(
            "" if special else token for token, special in zip(replay.tokens, replay.special.tolist(), strict=True)
        )
        found = keywords(answer)
        if not found:
            raise SelectionError("YAKE finds no keyword in this answer")
        return select_tokens(replay, words=found)
    if rule == "joint":
        return select_tokens(replay, rule="joint")
    return select_tokens(replay, alpha=alpha)
