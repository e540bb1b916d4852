"""Where things are in a vision-language model: encoders, mergers, decoder, image tokens, pixel inputs.

Found, not listed: the library's own accessors first (``get_encoder``, ``get_decoder``, ``get_image_features``), the
module graph next. ``families.yaml``, and for families outside transformers their plugin (``families``), say only what
neither can tell.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lvlm_probe.errors import AttachError, PointNotFound
from lvlm_probe.models.drivers import Driver
from lvlm_probe.models.families import Family, TokenBoxes, family_of

# Sub-strings under which model authors file the module between encoder and decoder, most specific first.
_MERGER_NAMES = (
    "multi_modal_projector", "multimodal_projector", "mm_projector", "vision_projection", "visual_projection",
    "image_to_text_projection", "embed_vision", "connector", "aligner", "projector", "merger", "resampler",
)  # fmt: skip
# What pixel inputs are called in models that their authors publish beside the weights.
_IMAGE_INPUTS = frozenset({"image", "images", "picture", "pictures", "img", "imgs", "vision_x"})
_OF_PIXELS = ("pixel_", "image_", "video_", "high_res_pixel", "flattened_patches")
_ENCODER_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "image_encoder")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, as module paths relative to it.

    Attributes:
        encoders: paths of the vision encoders; empty for encoder-free models.
        mergers: paths of the modules that turn encoder outputs into image-token embeddings.
        decoder: path of the language model (``""`` when the model is its own decoder).
        image_token_id: id of the placeholder token that image features replace, ``None`` where the prompt holds none.
        video_token_id: id of the one that features of videos replace, where that is another one.
        takes_clips: whether recordings of videos have been checked for the family (``families.yaml``).
        pixel_names: names of the ``generate`` arguments that carry the image, as far as the model's signatures tell.
        answer_token_type: token type of answer tokens in a teacher-forced pass.
        encoder_decoder: the prompt and its images go into an encoder, and the answer is the decoder's sequence.
        reads_prompt: there is a text beside the answer's own sequence. False in readers, whose encoder is given the
            image alone (Donut, Pix2Struct): what stands for a prompt there is the beginning of the decoder's sequence.
        no_gradient: why no gradient reaches the image; empty where one does, as far as is known.
        token_boxes: where image tokens lie, as the family's plugin says; ``None``: the model is asked.
    """

    encoders: tuple[str, ...]
    mergers: tuple[str, ...]
    decoder: str
    image_token_id: int | None
    pixel_names: frozenset[str]
    answer_token_type: int = 0
    encoder_decoder: bool = False
    reads_prompt: bool = True
    no_gradient: str = ""
    token_boxes: TokenBoxes | None = None
    video_token_id: int | None = None
    takes_clips: bool = False

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids of the tokens that features of images and of videos replace."""
        return tuple(token for token in (self.image_token_id, self.video_token_id) if token is not None)

    @property
    def encodes_prompt(self) -> bool:
        """Whether the prompt goes into an encoder, apart from the decoder's sequence."""
        return self.encoder_decoder and self.reads_prompt

    def is_pixel_name(self, name: str) -> bool:
        """Whether a ``generate`` argument carries the image (pixels, grids, sizes, pixel masks)."""
        if name in self.pixel_names:
            return True
        # A mask of images has an entry per token of the prompt: which image it sees, or is a part of.
        return not _of_tokens(name) and name.startswith(_OF_PIXELS)


def _declared(model: torch.nn.Module) -> Family:
    """What is declared of the model's family, here or by its plugin."""
    if isinstance(model, Driver):
        return model.family
    model_type = str(getattr(getattr(model, "config", None), "model_type", "") or "")
    return family_of(model_type) or Family()


def examine(model: torch.nn.Module, processor: object | None = None) -> Anatomy:
    """Find the parts of ``model``.

    Raises:
        AttachError: the model cannot generate from images, or its family is declared as one that cannot be probed.
        PointNotFound: a part that its plugin declares is not there.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    family = _declared(model)
    if family.unsupported is not None:
        raise AttachError(f"{name} cannot be probed: {family.unsupported}")
    if config is None or not callable(getattr(model, "generate", None)):
        inner = getattr(model, "module", None)  # of DataParallel, and of those that wrap as it does
        if callable(getattr(inner, "generate", None)):
            raise AttachError(f"{name} wraps the model that generates: attach its `.module`")
        raise AttachError(
            f"{name} is not a Hugging Face generative model (no `config` or no `generate`); attach the object that "
            f"AutoModelForImageTextToText.from_pretrained(...) returns"
        )
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    encoder_decoder, reads_prompt = _has_decoder(model), reads_a_prompt(model)
    encoders = _given(model, family.encoders) or _encoders(model, paths, whole=not reads_prompt)
    mergers = _given(model, family.mergers) or _mergers(model, encoders)
    pixel_names = _pixel_names(model) | family.pixel_names
    if not encoders and not mergers and not pixel_names:
        raise AttachError(
            f"{name} has no vision encoder that can be found and takes no pixels: it looks like a text-only model; "
            f"attach a vision-language model (AutoModelForImageTextToText)"
        )
    decoder = _given(model, (family.decoder,))[0] if family.decoder else family.decoder
    if decoder is None:
        hub: Any = model
        found = hub.get_decoder() if hasattr(hub, "get_decoder") else model
        decoder = paths.get(id(text_stack(found)), "")
    if not encoders and pixel_names:
        encoders, between = _beside(model, decoder)
        mergers = mergers or between
    if not reads_prompt:
        pixel_names |= {"attention_mask"}  # of patches: the encoder reads nothing else
    image_token_id = family.image_token if isinstance(family.image_token, int) else None
    if family.image_token is None and reads_prompt:
        image_token_id = _token_id(model, processor, "image")
    return Anatomy(
        encoders=encoders,
        mergers=mergers,
        decoder=decoder,
        image_token_id=image_token_id,
        pixel_names=pixel_names,
        answer_token_type=family.answer_token_type,
        encoder_decoder=encoder_decoder,
        reads_prompt=reads_prompt,
        no_gradient=family.no_gradient,
        token_boxes=family.token_boxes,
        # Elsewhere a config may name one by default that is a word of the checkpoint's own vocabulary.
        video_token_id=_token_id(model, None, "video") if family.clips and image_token_id is not None else None,
        takes_clips=family.clips,
    )


def reads_a_prompt(model: torch.nn.Module) -> bool:
    """Whether a model is given a text beside the answer's own sequence: not where its encoder reads the image alone."""
    hub: Any = model
    if not _has_decoder(model):
        return True
    try:
        encoder = hub.get_encoder()
    except (AttributeError, NotImplementedError, TypeError):
        return True
    return encoder is model or "input_ids" in inspect.signature(encoder.forward).parameters


def text_stack(decoder: torch.nn.Module) -> torch.nn.Module:
    """The stack of text layers inside what ``get_decoder()`` answered.

    That is the model itself where the library knows no name of its parts: then it is the first part with layers of its
    own that embeds words.
    """
    if any(isinstance(child, torch.nn.ModuleList | torch.nn.Embedding) for child in decoder.children()):
        return decoder
    for module in decoder.modules():
        layers = any(isinstance(child, torch.nn.ModuleList) for child in module.children())
        if layers and any(isinstance(child, torch.nn.Embedding) for child in module.children()):
            return module
    return decoder


def find_modules(model: torch.nn.Module, pattern: str) -> list[tuple[str, torch.nn.Module]]:
    """Modules whose path matches an fnmatch ``pattern``, in model order.

    Raises:
        PointNotFound: none matches; the message names the closest paths.
    """
    modules = [(path, module) for path, module in model.named_modules() if path]
    found = [(path, module) for path, module in modules if fnmatch.fnmatchcase(path, pattern)]
    if not found:
        close = difflib.get_close_matches(pattern, [path for path, _ in modules], n=3, cutoff=0.3)
        hint = f"; closest: {', '.join(map(repr, close))}" if close else ""
        raise PointNotFound(f"no module matches {pattern!r} in {type(model).__name__}{hint}")
    return found


def _given(model: torch.nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Declared parts. A pattern's ``*`` runs over dots too, so that what lies inside a match is no part of its own."""
    found = [path for pattern in patterns for path, _ in find_modules(model, pattern)]
    return _outermost(list(dict.fromkeys(found)))


def _encoders(model: torch.nn.Module, paths: Mapping[int, str], *, whole: bool) -> tuple[str, ...]:
    """Paths of the vision encoders; ``whole``: the model's encoder reads nothing but the image."""
    hub: Any = model
    if whole:
        return (paths[id(hub.get_encoder())],)
    if hasattr(hub, "get_encoder"):
        try:
            encoder = hub.get_encoder(modality="image")
        except TypeError:
            encoder = None
        path = paths.get(id(encoder), "")
        # get_encoder answers with the model itself where it finds none.
        if path and any(name in path for name in _ENCODER_NAMES):
            return (path,)
    named = [path for path in paths.values() if path.rpartition(".")[2] in _ENCODER_NAMES]
    return _outermost(sorted(named, key=len))


def _mergers(model: torch.nn.Module, encoders: Sequence[str]) -> tuple[str, ...]:
    for name in _MERGER_NAMES:
        hits = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == name]
        # An encoder's own `projector`-like parts count only where nothing outside the encoders carries the name.
        outside = [path for path in hits if not any(path.startswith(encoder + ".") for encoder in encoders)]
        if outside or hits:
            return _outermost(outside or hits)
    return ()


def lm_head(model: Any) -> Any:
    """The module that makes logits of the decoder's last states; ``None`` where the model hands out none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _beside(model: torch.nn.Module, decoder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands beside the decoder in a model whose names say nothing: parts with a stack of layers are encoders,
    parts with other weights lead from them to the decoder.
    """
    head = lm_head(model)
    steps = decoder.split(".") if decoder else []
    for depth, step in enumerate(steps):
        above = ".".join(steps[:depth])
        parts = {
            f"{above}.{name}".lstrip("."): part
            for name, part in model.get_submodule(above).named_children()
            if name != step and part is not head and next(part.parameters(), None) is not None
        }
        encoders = tuple(
            path
            for path, part in parts.items()
            if any(isinstance(inner, torch.nn.ModuleList) for inner in part.modules())
        )
        if encoders:
            return encoders, tuple(path for path in parts if path not in encoders)
    return (), ()


def _has_decoder(model: torch.nn.Module) -> bool:
    """Whether the answer is a sequence of its own. A ``generate`` of the model's own may say so by the start token."""
    own = isinstance(getattr(model, "decoder_start_token_id", None), int)
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or own


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in paths:
        if not any(path.startswith(other + ".") for other in kept):
            kept.append(path)
    return tuple(kept)


def _of_tokens(name: str) -> bool:
    return name.startswith("image_") and name.endswith("_mask")


def _pixel_names(model: torch.nn.Module) -> frozenset[str]:
    names: set[str] = set()
    for owner in (model, getattr(model, "base_model", model)):
        for function in (getattr(owner, f"get_{kind}_features", None) for kind in ("image", "video")):
            if function is not None:
                names |= set(inspect.signature(function).parameters)
    names |= {
        name
        for name in inspect.signature(model.forward).parameters
        if "pixel" in name or (name.startswith("image_") and not _of_tokens(name)) or name in _IMAGE_INPUTS
    }
    return frozenset(
        names - {"self", "kwargs", "return_dict", "vision_feature_layer", "vision_feature_select_strategy"}
    )


def _token_id(model: torch.nn.Module, processor: object | None, kind: str) -> int | None:
    names = (f"{kind}_token_id", f"{kind}_token_index")
    for owner, mine in ((model.config, names), (processor, names[:1])):
        for name in mine:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None
