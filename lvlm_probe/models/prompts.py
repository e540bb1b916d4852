"""The inputs of a model for images and a question, by the processor's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["chat_inputs", "placed"]


def chat_inputs(
    processor: Any, images: Sequence[Image.Image], question: str, *, note: Callable[[str], None] | None = None
) -> Any:
    """Inputs for ``generate()``: one user turn with the images first and the question after them.

    A processor without a chat template gets its image tokens and the question.

    Args:
        processor: the model's processor.
        images: the images, in order.
        question: what is asked.
        note: called with a sentence when there is no template.

    Raises:
        ProbeError: there is neither a template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": question})
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ProbeError(
            f"{type(processor).__name__} has neither a chat template nor an image token, so it cannot be prompted; "
            f"set processor.chat_template and save it, or record in Python with probe.attach"
        )
    prompt = f"{token}\n" * len(images) + question
    if note is not None:
        note(f"{type(processor).__name__} has no chat template; the prompt is {prompt!r}")
    return processor(images=list(images), text=prompt, return_tensors="pt")


def placed(inputs: Any, model: Any) -> Any:
    """The same inputs on the model's device, floating ones in its dtype."""
    inputs = inputs.to(model.device)
    dtype = getattr(model, "dtype", None)
    for name, value in inputs.items():
        if dtype is not None and hasattr(value, "is_floating_point") and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs
