"""The user's image processor as a function from images to named tensors, and the cache of what was traced of it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from lvlm_probe.errors import ImageError, ProcessorRefused
from lvlm_probe.images.positions import Geometry
from lvlm_probe.images.tracing import trace_geometry
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.process import of_the_last

NOT_KEPT = ("images", "return_tensors", "device")
"""Arguments of a processor call that are of the moment: what it was given, and where its outputs were wanted."""

OWN_CALL: ContextVar[bool] = ContextVar("lvlm_probe_own_call", default=False)
"""True while this package itself runs the user's image processor, so that a watcher on it can look away."""

ARRAY = "lvlm_probe_array"
"""In ``Image.info`` of a transparent image that a processor was given as an array: ``channels_first`` or
``channels_last``. Processors lay arrays over their background otherwise than PIL images, by a level here and there."""

_CACHED_SIZES = 4
# Geometry depends on nothing but the processor, its settings and the images' sizes, and a session that records a
# thousand images of one camera must trace once. The cache lives and dies with the user's processor object: weak keys,
# a few sizes each. It holds derived facts only, so that emptying it changes nothing but time.
_geometries: MutableMapping[object, OrderedDict[str, Geometry]] = weakref.WeakKeyDictionary()


class BlackBox:
    """The user's image processor as a function from images to named tensors."""

    def __init__(
        self, image_processor: Callable[..., Any], call_kwargs: dict[str, Any], structure: str, *, plain: bool = False
    ) -> None:
        call = getattr(image_processor, "image_processor", None) or image_processor
        self.call: Callable[..., Any] = call
        self.name: str = getattr(call, "processor_name", None) or type(call).__name__
        if structure not in ("flat", "nested"):
            raise ImageError(f"structure must be 'flat' or 'nested'; got {structure!r}.")
        self._kwargs = {key: value for key, value in call_kwargs.items() if key not in NOT_KEPT}
        self._nested = structure == "nested"
        # Traced geometry lives as long as the user's own object: of a clip's step the video processor in it.
        self._owner, self._plain = getattr(call, "geometry_owner", call), plain
        self._then = processor_settings(call)

    @property
    def _present(self) -> Callable[..., Any]:
        """The image processor with the settings that it had when this was made, whatever it is set to by now."""
        present: Callable[..., Any] = with_settings(self.call, self._then)[0]
        return present

    def __call__(self, images: Sequence[Image.Image], *, prompts: int = 1) -> dict[str, Tensor]:
        """The outputs for one prompt's images, or for ``prompts`` prompts with the same ones each."""
        shown = [_as_given(image) for image in images]
        given: list[Any] = [shown] * prompts if self._nested else shown * prompts
        ours = OWN_CALL.set(True)
        try:
            out = self._present(images=given, return_tensors="pt", **self._kwargs)
        except Exception as error:
            if ran_out(error):
                raise
            sizes = ", ".join(f"{image.width}x{image.height} {image.mode}" for image in images)
            raise ImageError(
                f"{self.name} cannot process {sizes}: {type(error).__name__}: {error}. The same call fails outside "
                "the probe; change the image or the processor's settings."
            ) from error
        finally:
            OWN_CALL.reset(ours)
        return {
            key: tensor
            for key, value in named_outputs(self.call, out).items()
            if (tensor := self._tensor(key, value)) is not None
        }

    def own_rgb(self, image: Image.Image) -> Image.Image:
        """The image in the RGB that transformers' image processors make of it before all else.

        Raises:
            ImageError: this one has no such step, or none that gives 8-bit RGB.
        """
        step = getattr(self._present, "process_image", None)
        try:
            made = None if step is None else np.asarray(step(_as_given(image), do_convert_rgb=True))
        except Exception as error:
            if ran_out(error):
                raise
            raise ImageError(f"{self.name} does not convert {image.mode} to RGB by itself: {error}") from error
        if made is None or made.dtype != np.uint8 or made.shape != (3, image.height, image.width):
            raise ImageError(f"{self.name} does not convert {image.mode} to 8-bit RGB by itself")
        return Image.fromarray(np.ascontiguousarray(made.transpose(1, 2, 0)))

    def _tensor(self, key: str, value: Any) -> Tensor | None:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, np.ndarray) and value.dtype != object:
            return torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, (Tensor, np.ndarray)) for part in value):
            parts = [torch.as_tensor(part) for part in value]
            if any(part.shape != parts[0].shape for part in parts):
                raise ProcessorRefused(
                    f"{self.name}: {key!r} is a list of arrays of different shapes, which has no batch axis to repeat "
                    "masks along. Ask the processor to pad, or record one image per prompt."
                )
            return torch.stack(parts).cpu()
        return whole_numbers(value)  # anything else, names among them, is no input of a model

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the user's own call."""
        return dict(self._kwargs)

    def without_normalisation(self) -> BlackBox:
        """The same processor, told to leave grey levels as they are."""
        made = BlackBox(self.call, self._kwargs, "nested" if self._nested else "flat", plain=True)
        # Not do_normalize=False: Kosmos-2.5's cannot cut whole numbers into patches.
        made.call = call = copy.copy(self._present)
        made._then = {}  # this one is nobody else's
        for name in [name for name, value in vars(call).items() if callable(value)]:
            delattr(call, name)  # a watcher would run the original
        call.normalize = _as_floats  # type: ignore[attr-defined]
        return made

    def geometry(self, sizes: Sequence[tuple[int, int]], reference: Mapping[str, Tensor]) -> tuple[Geometry, bool]:
        """The geometry for images of these sizes, and whether it had to be traced now."""
        token = self._token(sizes, reference)
        try:
            known = _geometries.setdefault(self._owner, OrderedDict())
        except TypeError:  # not hashable or not weakly referable: trace each time
            known = OrderedDict()
        traced: list[Geometry] = []

        def trace() -> Geometry:
            traced.append(trace_geometry(self, sizes, reference, name=self.name))
            return traced[0]

        return of_the_last(known, token, trace, most=_CACHED_SIZES), bool(traced)

    def _token(self, sizes: Sequence[tuple[int, int]], reference: Mapping[str, Tensor]) -> str:
        # Settings are plain values; whatever can be called (a watcher on the instance) is none.
        present = self._present
        settings = getattr(present, "geometry_key", None) or {
            name: value for name, value in getattr(present, "__dict__", {}).items() if not callable(value)
        }
        shapes = {key: list(value.shape) for key, value in reference.items()}
        state = [settings, self._kwargs, self._nested, self._plain, [list(size) for size in sizes], shapes]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()


def _as_given(image: Image.Image) -> Any:
    order = image.info.get(ARRAY) if image.mode == "RGBA" else None  # conversions hand the note on
    if order is None:
        return image
    return np.asarray(image).transpose(2, 0, 1) if order == "channels_first" else np.asarray(image)


def _as_floats(image: Any, *_args: Any, **_kwargs: Any) -> Any:
    return image.float() if isinstance(image, Tensor) else np.asarray(image, dtype=np.float32)


def whole_numbers(value: Any) -> Tensor | None:
    """A list of whole numbers, nested or not, as a tensor; ``None`` for anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    try:
        made = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):  # names, or rows of unequal length
        return None
    return None if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool else made


def named_outputs(image_processor: Any, out: Any) -> dict[str, Any]:
    """What an image processor returned, by name; one that returns the pixels alone (Idefics) says what they are.
    A processor's own image step returns the texts that stand for the images beside it."""
    if isinstance(out, tuple):
        out = out[0]
    if not isinstance(out, Tensor):
        return dict(out) if isinstance(out, Mapping) or hasattr(out, "keys") else {}
    names = getattr(image_processor, "model_input_names", None) or ["pixel_values"]
    return {str(names[0]): out}


def by_prompt(made: Tensor, given: Tensor) -> bool:
    """Whether the processor around an image processor has put an axis in front, the prompts, which have equally many
    images each (Idefics)."""
    more = made.ndim > 0 and given.ndim == made.ndim + 1
    return more and given.shape[:2].numel() == len(made) and given.shape[2:] == made.shape[1:]


def as_rgb(
    processor: BlackBox, images: Sequence[Image.Image]
) -> tuple[list[Image.Image], dict[str, Tensor], tuple[str, ...]]:
    """The images in the RGB that the processor sees (transparency, palettes, EXIF rotation), and its outputs for them.

    Composites are RGB. Processors differ in how they read other modes, so each plausible conversion is tried against
    the processor's output on the original itself.
    """
    truth = processor(images)
    special = [image.mode != "RGB" or image.getexif().get(0x0112, 1) != 1 for image in images]
    if not any(special):
        return list(images), truth, ()
    for convert, what in (
        (lambda image: image.convert("RGB"), "converted to RGB"),
        (_over_white, "laid over white"),
        (lambda image: ImageOps.exif_transpose(image).convert("RGB"), "turned upright (EXIF) and converted to RGB"),
        (lambda image: _over_white(ImageOps.exif_transpose(image)), "turned upright (EXIF) and laid over white"),
        (processor.own_rgb, "laid over its own background"),
    ):
        try:
            candidate = [convert(image) if odd else image for image, odd in zip(images, special, strict=True)]
        except ImageError:  # there is no such conversion
            continue
        out = processor(candidate)
        if out.keys() == truth.keys() and all(
            value.shape == out[key].shape and torch.equal(value, out[key]) for key, value in truth.items()
        ):
            modes = ", ".join(sorted({image.mode for image, odd in zip(images, special, strict=True) if odd}))
            return (
                candidate,
                out,
                (f"{modes} image {what}, as the processor does",) if what != "converted to RGB" else (),
            )
    modes = ", ".join(image.mode for image in images)
    raise ProcessorRefused(
        f"{processor.name}: no conversion to RGB gives what the processor makes of these images (mode {modes}), so a "
        "mask could not blend what the model sees. Call image.convert('RGB') before the processor."
    )


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def compare_reference(
    run: Callable[[list[Image.Image]], Mapping[str, Tensor]],
    images: Sequence[Image.Image],
    inputs: Mapping[str, Tensor],
    reference: Mapping[str, Any],
    name: str,
    *,
    because: str = "",
) -> list[str]:
    """Hold what a processor makes of some images against what the model was run on.

    Args:
        run: the processor, from images to named outputs.
        images: the images.
        inputs: its outputs for them.
        reference: what the model was fed.
        name: of the processor.
        because: what is known to differ from that run, for the notes.

    Returns:
        notes on differences that another backend's resampling or the rounding of a dtype explains.

    Raises:
        ImageError: none of its pixel outputs is what the model was fed, or one differs by more than that.
    """
    fed = {key: value.detach().cpu() for key, value in reference.items() if isinstance(value, Tensor)}
    if not any(value.is_floating_point() and key in fed for key, value in inputs.items()):
        made = ", ".join(sorted(key for key, value in inputs.items() if value.is_floating_point())) or "no pixels"
        raise ImageError(
            f"{name} returns {made}, and the model was fed {', '.join(sorted(fed))}: a mask would reach nothing of it. "
            "Give the whole processor that made the inputs."
        )
    notes = []
    bounds: Mapping[str, Tensor] | None = None
    for key, value in inputs.items():
        if key not in fed:
            continue
        given = fed[key]
        if by_prompt(value, given):
            given = given.flatten(0, 1)
        if given.shape != value.shape:
            raise ImageError(
                f"{name}: for these images {key!r} has shape {tuple(value.shape)}, but the model was run on "
                f"{tuple(given.shape)}. These are not the images (or not the processor settings) of that run."
            )
        if torch.equal(value.to(given.dtype), given):
            continue
        apart = (value.double() - given.double()).abs()
        bounds = resampling_bounds(run, images, inputs) if bounds is None else bounds
        within = bounds[key].double() if key in bounds else torch.zeros(())
        if value.is_floating_point():
            within = within + torch.finfo(given.dtype).eps * value.double().abs()
        if not bool((apart <= within).all()):
            raise ImageError(
                f"{name}: {key!r} of these images differs by up to {float(apart.max()):.3g} from what the model was "
                f"run on, more than another backend would. These are not the images (or not the processor settings) "
                f"of that run."
            )
        notes.append(f"{key!r} differs by up to {float(apart.max()):.3g} from what the model was run on{because}")
    return notes


_LEVELS = 2  # grey levels: 8-bit rounding in both passes of a resize
_SHARE = 0.25
_REACH = 2.0  # pixels of the output to each side, where kernels have nearly all their weight


def resampling_bounds(
    run: Callable[[list[Image.Image]], Mapping[str, Tensor]],
    images: Sequence[Image.Image],
    inputs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """How far two implementations of one image processor may be apart at each element of its outputs.

    Two resize kernels that each sum to 1 differ, at one element, by at most half the L1 distance of the kernels times
    the range of the pixels they reach: bicubic and Lanczos are some 0.2 apart in two dimensions, and a quarter is
    allowed. The range is had without knowing the layout of the outputs: the processor is run on the local maximum and
    on the local minimum of the images. To that come 2 grey levels for rounding, whose size is read off two grey images.
    Where the image is even nothing else is allowed, however small the part that differs.
    """
    reaches = [_reach(image, inputs, len(images)) for image in images]
    pairs = list(zip(images, reaches, strict=True))
    high, low = (run([_extreme(image, sign, reach) for image, reach in pairs]) for sign in (1, -1))
    light, dark = (run([Image.new("RGB", image.size, (grey,) * 3) for image in images]) for grey in (132, 124))
    bounds = {}
    for key, value in inputs.items():
        ends = [made.get(key) for made in (high, low, light, dark)]
        if value.is_floating_point() and all(end is not None and end.shape == value.shape for end in ends):
            above, below, one, other = (end.float() for end in ends if end is not None)
            # Margins that are filled up, where neither shows, are rounded too.
            level = (one - other).abs().max() / 8
            bounds[key] = _SHARE * (above - below).abs() + _LEVELS * level
    return bounds


def _reach(image: Image.Image, inputs: Mapping[str, Tensor], images: int) -> int:
    """``_REACH`` output pixels in pixels of the image, at the coarsest view of it that the outputs hold."""
    views = [
        (value[0] if value.ndim == 4 else value[0, 0]).numel() if value.ndim >= 4 else value.numel() / images
        for value in inputs.values()
        if value.is_floating_point() and value.numel()
    ]
    scale = math.sqrt(image.width * image.height * 3 / min(views)) if views else 1.0
    return max(1, math.ceil(_REACH * min(scale, 64.0)))


def _extreme(image: Image.Image, sign: int, reach: int) -> Image.Image:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() * sign
    width = 2 * reach + 1
    tall = F.max_pool2d(pixels, (width, 1), 1, (reach, 0))
    found = F.max_pool2d(tall, (1, width), 1, (0, reach)) * sign
    return Image.fromarray(found[0].permute(1, 2, 0).byte().numpy())


def processor_settings(image_processor: Any) -> dict[str, Any]:
    """The settings of an image processor as JSON."""
    to_dict = getattr(image_processor, "to_dict", None)
    # What can be called is no setting, but a watcher that hangs on the instance.
    found = {name: value for name, value in to_dict().items() if not callable(value)} if callable(to_dict) else {}
    made: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return made


# What names a class or a file and changes no pixel; and a watcher, which older traces took for a setting.
_NAMES = (
    "preprocess",
    "image_processor_type",
    "video_processor_type",
    "processor_class",
    "feature_extractor_type",
    "auto_map",
    "name_or_path",
    "device",
)
_set_back: MutableMapping[object, dict[str, Any]] = weakref.WeakKeyDictionary()


def with_settings(image_processor: Any, recorded: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """An image processor with the settings it had at a call.

    Args:
        image_processor: as it is now; it is not changed.
        recorded: what ``processor_settings`` said then; ``None`` or empty where that is not known.

    Returns:
        the same image processor where nothing differs, else a new one of its class; and what differs, by name, as it
        was recorded.

    Raises:
        ImageError: it cannot be had with those settings; the message names them.
    """
    if not recorded:
        return image_processor, {}
    now, then = processor_settings(image_processor), dict(recorded)
    if then.get("image_processor_type") != now.get("image_processor_type"):
        # Another class (of another backend) has settings of its own beside those that both have.
        then = {**now, **{name: value for name, value in then.items() if name in now}}
    then = {name: value for name, value in then.items() if name not in _NAMES}
    if not (changed := _changed(now, then)):
        return image_processor, {}
    key = json.dumps(then, sort_keys=True)
    try:
        made = _set_back.get(image_processor, {}).get(key)
        if made is None:
            made = type(image_processor).from_dict(json.loads(key))
            _set_back[image_processor] = {key: made}
    except Exception as error:
        told = ", ".join(f"{name}={value!r}" for name, value in sorted(changed.items()))
        raise ImageError(
            f"the processor's settings were {told} at that call and are others now, and "
            f"{type(image_processor).__name__} cannot be made with them; set them back on the image processor"
        ) from error
    if left := _changed(processor_settings(made), then):
        raise ImageError(f"{type(image_processor).__name__} does not take the recorded settings: {', '.join(left)}")
    # A newer class may only spell out what was the default.
    return (made, changed) if _changed(now, processor_settings(made)) else (image_processor, {})


def _changed(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    names = (now.keys() | then.keys()) - set(_NAMES)
    return {name: then.get(name) for name in names if now.get(name) != then.get(name)}
