"""The zoo: a tiny model with random weights, and the real processor, of every family that takes images and answers.

A member is a class of transformers, unmodified, built from a config of a few hundred thousand weights, and the family's
own ``ProcessorMixin`` around a byte-level tokenizer, with the image processor of either backend. Members stand in
``members/``, one module per kind of architecture; each registers with :func:`member`.

``build`` makes a member in memory. ``save`` writes it as its author would, which takes torchvision, and ``opened``
reads it as a user would: by ``probe.load``, with what is installed.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from PIL import Image
from tiny_models import make_chat_template, make_tokenizer, picture, redraw
from transformers.utils import is_torchvision_available

import lvlm_probe as probe

__all__ = [
    "INSTALL",
    "MEMBERS",
    "Backend",
    "Built",
    "Install",
    "Member",
    "ask",
    "build",
    "image_processor",
    "load_members",
    "member",
    "opened",
    "save",
]

Backend = Literal["pil", "torchvision"]
Install = Literal["default", "torchvision"]
INSTALL: Install = "torchvision" if is_torchvision_available() else "default"
"""Which of the two environments this is. The one with torchvision has timm and num2words too."""


@dataclass(frozen=True)
class Member:
    """One family of the zoo.

    Attributes:
        name: its entry in transformers' image-text-to-text mapping.
        kind: its preprocessing, A to L (docs/families.md).
        model: token ids by token → the model, on the CPU.
        processor: tokenizer, backend → the processor.
        tokens: special tokens besides padding, start and end.
        slot: what the chat template writes for an image.
        named: names that the tokenizer gives to some tokens (``image_token``).
        backends: those its image processor has.
        size: a picture, ``(width, height)``.
        larger: another picture; one that is cut into tiles or local crops where the family does that.
        nested: the processor takes one list of pictures per prompt.
        templated: there is a chat template; without one the processor itself puts the picture in front of the question.
        call: arguments of the processor's call that make images of the size the tiny model is made for, where its
            family's are larger and no saved setting changes that.
        prepare: makes the model inputs where ``ask`` does not.
        cached: generate() is compared with a cache; ``False`` where transformers' own answer depends on that.
        attention: why no attention rows can be compared with eager ones; empty where they can.
        discrete: why no gradient reaches the picture; empty where one does.
        local: without attention, a token of the encoder sees its own box alone (no convolutions across patches).
        answer: further arguments of ``generate()``.
        seed: of the weights.
    """

    name: str
    kind: str
    model: Callable[[dict[str, int]], Any]
    processor: Callable[[Any, Backend], Any]
    tokens: tuple[str, ...] = ()
    slot: str = "<image>\n"
    named: Mapping[str, str] = field(default_factory=dict)
    backends: tuple[Backend, ...] = ("pil", "torchvision")
    size: tuple[int, int] = (90, 60)
    larger: tuple[int, int] | None = None
    nested: bool = False
    templated: bool = True
    call: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, Any, Sequence[Image.Image], str], Mapping[str, Any]] | None = None
    cached: bool = True
    attention: str = ""
    discrete: str = ""
    local: bool = True
    answer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


MEMBERS: dict[str, Member] = {}

SLOW = frozenset({"gemma3n", "emu3"})
"""Families whose smallest model takes six seconds and more: `make campaign` has them."""


def member(**settings: Any) -> Member:
    """Register a member of the zoo."""
    made = Member(**settings)
    if made.name in MEMBERS:
        raise ValueError(f"{made.name} is in the zoo already")
    MEMBERS[made.name] = made
    return made


def load_members() -> dict[str, Member]:
    """All members, by name."""
    package = importlib.import_module("members")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"members.{module.name}")
    return MEMBERS


def image_processor(name: str, backend: Backend, **settings: Any) -> Any:
    """``transformers.<name>`` of one backend: the PIL class carries the suffix ``Pil`` or, where it has no twin, none.

    ``name`` is that of the torchvision class, e.g. ``CLIPImageProcessor``.
    """
    if backend == "pil" and hasattr(transformers, f"{name}Pil"):
        name = f"{name}Pil"
    return getattr(transformers, name)(**settings)


def ask(
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    *,
    nested: bool = False,
    templated: bool = True,
    **call: Any,
) -> Any:
    """Model inputs for one prompt, by the real ``ProcessorMixin.__call__``; see ``Member`` for the arguments."""
    text = question
    if templated:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given: Any = [list(images)] if nested else list(images)
    return processor(images=given, text=[text], return_tensors="pt", **call)


@dataclass(frozen=True)
class Built:
    """A member that has been built in memory, or opened from a directory."""

    member: Member
    model: Any
    processor: Any
    directory: Path | None = None

    def twin(self) -> Built:
        """Another one like it, from the same directory."""
        assert self.directory is not None
        return opened(self.member.name, self.directory)

    def inputs(self, images: Sequence[Image.Image], question: str = "What colour is the circle?") -> dict[str, Any]:
        """Model inputs for one prompt, by the real ``ProcessorMixin.__call__``."""
        mine = self.member
        if mine.prepare is not None:
            made = mine.prepare(self.model, self.processor, images, question)
        else:
            made = ask(self.processor, images, question, nested=mine.nested, templated=mine.templated, **mine.call)
        return dict(made)

    def picture(self, *, larger: bool = False, seed: int = 0) -> Image.Image:
        """A smooth random picture of the member's size."""
        width, height = self.member.larger if larger and self.member.larger else self.member.size
        return picture(width, height, seed=seed)

    def generate(self, inputs: Mapping[str, Any], tokens: int = 4, **settings: Any) -> Any:
        """Exactly ``tokens`` greedy tokens, with their logits."""
        with torch.no_grad():
            return self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **{**self.member.answer, **settings},
            )


def build(name: str, backend: Backend = "torchvision") -> Built:
    """Model and processor of one member: float32, eval mode, weights fixed by the member's seed, all paths open."""
    found = MEMBERS[name]
    tokenizer = make_tokenizer(found)
    processor = found.processor(tokenizer, backend)
    processor.chat_template = make_chat_template(found.slot)
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(found.seed)
    try:
        model = found.model(tokenizer.get_vocab())
    finally:
        torch.random.set_rng_state(state)
    redraw(model, found.seed)
    model = model.float().eval()
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id, generation.do_sample = tokenizer.pad_token_id, False
    return Built(found, model, processor)


def save(name: str, directory: Path) -> Path:
    """Save a member with ``save_pretrained``, without a chat template where its family has none."""
    built = build(name, MEMBERS[name].backends[-1])
    if not MEMBERS[name].templated:
        built.processor.chat_template = None
    built.model.save_pretrained(directory)
    built.processor.save_pretrained(directory)
    return directory


def opened(name: str, directory: Path) -> Built:
    """A saved member as a user has it."""
    model, processor = probe.load(directory, device="cpu")
    return Built(MEMBERS[name], model, processor, directory)
