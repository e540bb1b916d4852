"""One question asked by this package itself: the prompt, ``generate()`` with the probe attached, the trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError
from lvlm_probe.models.prompts import chat_inputs, placed, prompt_rule
from lvlm_probe.recording.probe import attach

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lvlm_probe.trace import Trace

__all__ = ["record_answer"]


def record_answer(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    directory: str | os.PathLike[str],
    *,
    generate: Mapping[str, Any],
    prompt: str | None = None,
    note: Callable[[str], None] | None = None,
    **record: Any,
) -> Trace:
    """Record a model's answer to a question about images, greedy unless ``generate`` says otherwise.

    Args:
        directory: where the trace goes.
        generate: arguments of ``model.generate`` besides the inputs.
        prompt: how the prompt is made, with ``{question}`` and ``{images}``; by default the processor's chat template,
            or the rule of the model's family. A rule is kept in ``trace.meta["prompt_rule"]``.
        note: called with a sentence where the prompt is not made by a chat template.
        **record: further options of ``Probe.record``.

    Returns:
        the trace, whose ``status`` may be an error.

    Raises:
        AttachError: the model cannot be probed, or is probed already.
        ProbeError: nothing was recorded; the message says why.
    """
    rule = prompt_rule(processor, model, prompt=prompt)
    if not question.strip() and (rule is None or rule.asks):
        raise ProbeError('there is no question: give question="…", on the command line --question "…"')
    if rule is not None:
        record["meta"] = {**(record.get("meta") or {}), "prompt_rule": rule.text}
    with attach(model, processor) as probe:
        with probe.record(directory, images=list(images), question=question or None, **record) as recording:
            inputs = placed(chat_inputs(processor, images, question, rule=rule, note=note), model, processor)
            model.generate(**inputs, **{"do_sample": False, **generate})  # type: ignore[operator]
        if not recording.paths:
            raise ProbeError("nothing was recorded: " + ("; ".join(recording.faults) or "the model saw no image"))
        return recording.traces[-1]
