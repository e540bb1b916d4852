"""What a plugin says of a model family that looking at the model cannot tell.

Parts of a model are found, not listed (``anatomy``). A family outside transformers may name its parts so that they are
not found, or may place its image tokens by rules of its own; its plugin then declares them::

    from lvlm_probe.models.families import Family, register_family

    register_family("my_vlm", Family(encoders=("model.towers.*",), decoder="model.language_model", token_boxes=boxes))

Plugins are loaded when a model's ``model_type`` is not one of transformers' own, and not before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from lvlm_probe.errors import PluginError
from lvlm_probe.plugins import check_registration, load_plugins

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Places:
    """Where tokens are.

    Attributes:
        boxes: ``(token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the original image; all 0 for a token without
            pixels (a newline, padding).
        images: ``(token,)`` int64, the image of each; -1 for a token without pixels.
        frames: ``(token, 2)`` int64, first and last image that it reads, where it may be several frames of a clip; its
            box is in each of them. ``None``: each token reads one image.
    """

    boxes: np.ndarray
    images: np.ndarray
    frames: np.ndarray | None = None


TokenBoxes = Callable[[Any, "np.ndarray"], "Places | None"]
"""``(replay, positions) -> Places``: where the tokens at ``positions`` ``(token,)`` of the prompt lie in the original
images (``replay.image_sizes``); a token without pixels has box 0 and image −1. ``None``: not known here, find out."""


@dataclass(frozen=True)
class Family:
    """What is declared of the models of one ``config.model_type``; everything has a default: it is found.

    Attributes:
        encoders, mergers: Module paths relative to the model, as fnmatch patterns.
        decoder: Module path of the language model.
        image_token: Id of the placeholder that image features replace; ``"none"`` where the prompt holds none.
        answer_token_type: Token type of answer tokens in a teacher-forced pass.
        pixel_names: Further arguments of ``generate`` that carry the image.
        token_boxes: Where image tokens lie, see ``TokenBoxes``.
        prompt: How a question is put where the processor has no chat template: a text with ``{question}`` and, where
            the processor wants the image tokens written out, ``{images}``. Several texts, one of them ``{images}``
            alone, where it takes the images themselves between the texts. Kept as a tuple.
        needs: Libraries without which its processor opens and does not work; a processor that does not open says so.
        begins: Where the text goes in a family that takes no question (captioners, readers): ``"input_ids"`` of
            ``generate()``, or ``"text"`` of the processor; ``prompt`` is then what the answer begins with, or nothing.
            Readers whose encoder is given the image alone are found.
        no_gradient: Why no gradient reaches the image of a model that can be masked all the same.
        unsupported: Why models of the family cannot be probed; ``attach`` refuses with this sentence.
        clips: Whether videos are recorded; other families' are refused.
    """

    encoders: tuple[str, ...] = ()
    mergers: tuple[str, ...] = ()
    decoder: str | None = None
    image_token: int | str | None = None
    answer_token_type: int = 0
    pixel_names: frozenset[str] = frozenset()
    token_boxes: TokenBoxes | None = None
    prompt: str | tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    no_gradient: str = ""
    begins: Literal["", "input_ids", "text"] = ""
    unsupported: str | None = None
    clips: bool = False

    def __post_init__(self) -> None:
        for name in ("encoders", "mergers", "pixel_names", "needs"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise PluginError(f"Family.{name} takes several names, not {value!r}; write {name}=({value!r},)")
        if isinstance(self.image_token, str) and self.image_token != "none":
            raise PluginError(f"Family.image_token is a token id, 'none' or None; got {self.image_token!r}")
        if self.begins not in ("", "input_ids", "text"):
            raise PluginError(f"Family.begins is 'input_ids', 'text' or ''; got {self.begins!r}")
        prompt = (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)
        if not all(isinstance(part, str) and part for part in prompt):
            raise PluginError(f"Family.prompt takes a text with {{question}}, or several, not {self.prompt!r}")
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "encoders", tuple(self.encoders))
        object.__setattr__(self, "mergers", tuple(self.mergers))
        object.__setattr__(self, "needs", tuple(self.needs))
        object.__setattr__(self, "pixel_names", frozenset(self.pixel_names))


_FAMILIES: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Declares the family of a ``config.model_type``. Declaring the same once more does nothing.

    Raises:
        PluginError: transformers has a family of that name, or another declaration of it exists already.
    """
    check_registration("a family", model_type, register_family, PluginError)
    if not isinstance(family, Family):
        raise PluginError(f"register_family({model_type!r}, …) takes a Family, not {type(family).__name__}")
    if built_in(model_type):
        raise PluginError(
            f"model_type {model_type!r} is one of transformers' own, whose parts are found without a declaration; "
            f"give the configuration class of your family a model_type of its own"
        )
    known = _FAMILIES.setdefault(model_type, family)
    if known != family:
        raise PluginError(
            f"a family with model_type {model_type!r} is declared already, by another plugin; uninstall one of the two "
            f"(lvlm_probe.plugins.load_plugins() lists them), or rename yours"
        )


@functools.cache
def _of_transformers() -> Mapping[str, Family]:
    """What looking at transformers' own families cannot tell."""
    import yaml

    text = resources.files("lvlm_probe").joinpath("families.yaml").read_text(encoding="utf-8")
    entries: Mapping[str, Mapping[str, Any]] = yaml.safe_load(text) or {}
    # "outside" is for the table of families alone.
    return {
        name: Family(**{key: value for key, value in entry.items() if key != "outside"})
        for name, entry in entries.items()
    }


def family_of(model_type: str) -> Family | None:
    """The declared family of a ``model_type``. Loads plugins where it is neither transformers' own nor known yet."""
    if known := _of_transformers().get(model_type):
        return known
    if model_type and model_type not in _FAMILIES and not built_in(model_type):
        load_plugins()
    return _FAMILIES.get(model_type)


def built_in(model_type: str) -> bool:
    """Whether transformers itself has models of this type. Imports nothing: who holds such a model has imported it."""
    library = sys.modules.get("transformers.models.auto.configuration_auto")
    return library is not None and model_type in library.CONFIG_MAPPING_NAMES
