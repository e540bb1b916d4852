"""Image processors of the eleven families, pictures to feed them, and odd third-party processors."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image

# module, class, settings of a published checkpoint's kind (built by hand: nothing is downloaded), call structure
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "clip": (
        "clip",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "flat",
    ),
    "siglip": ("siglip", "SiglipImageProcessor", {"size": {"height": 384, "width": 384}}, "flat"),
    "llava_next": (
        "llava_next",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "flat",
    ),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionImageProcessor", {}, "flat"),
    "qwen2_vl": (
        "qwen2_vl",
        "Qwen2VLImageProcessor",
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}},
        "flat",
    ),
    "idefics3": ("idefics3", "Idefics3ImageProcessor", {}, "nested"),
    "internvl": (
        "got_ocr2",
        "GotOcr2ImageProcessor",
        {"size": {"height": 448, "width": 448}, "crop_to_patches": True},
        "flat",
    ),
    "mllama": ("mllama", "MllamaImageProcessor", {"size": {"height": 560, "width": 560}}, "nested"),
    "gemma3": ("gemma3", "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}, "flat"),
    "gemma3 pan and scan": (
        "gemma3",
        "Gemma3ImageProcessor",
        {
            "size": {"height": 896, "width": 896},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 128,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        "nested",
    ),
    "pixtral": ("pixtral", "PixtralImageProcessor", {}, "flat"),
    "deepseek_vl_hybrid": ("deepseek_vl_hybrid", "DeepseekVLHybridImageProcessor", {}, "flat"),
}


# The same steps on fewer pixels: what tests use, while benchmarks keep the published sizes.
SMALLER: dict[str, dict[str, Any]] = {
    "idefics3": {"size": {"longest_edge": 728}},
    "internvl": {"size": {"height": 224, "width": 224}},
    "mllama": {"size": {"height": 224, "width": 224}},
    "gemma3": {"size": {"height": 336, "width": 336}},
    "gemma3 pan and scan": {"size": {"height": 336, "width": 336}},
    "deepseek_vl_hybrid": {"high_res_size": {"height": 512, "width": 512}},
}


def build(family: str, backend: str = "pil", *, small: bool = False, **settings: Any) -> tuple[Any, str]:
    """One family's processor with its PIL or torchvision backend, and its call structure."""
    module, name, defaults, structure = FAMILIES[family]
    infix, suffix = ("pil_", "Pil") if backend == "pil" else ("", "")
    source = importlib.import_module(f"transformers.models.{module}.image_processing_{infix}{module}")
    return getattr(source, name + suffix)(
        **{**defaults, **(SMALLER.get(family, {}) if small else {}), **settings}
    ), structure


def photograph(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Pink noise and flat boxes, as sharp as a photograph, without saturated pixels."""
    random = np.random.default_rng(seed)
    side = max(width, height, 8)
    frequency = np.fft.fftfreq(side)
    falloff = 1 / np.maximum(np.hypot(frequency[:, None], frequency[None]), 1 / side)
    noise = np.stack(
        [np.fft.ifft2(np.fft.fft2(random.standard_normal((side, side))) * falloff).real for _ in range(3)], axis=-1
    )[:height, :width]
    spread = noise.max() - noise.min() or 1.0
    pixels = (noise - noise.min()) / spread * 205 + 25
    for _ in range(6):
        left, top = random.integers(0, width), random.integers(0, height)
        pixels[top : top + height // 5, left : left + width // 5] = random.integers(30, 225, 3)
    return Image.fromarray(pixels.astype(np.uint8))


class Odd:
    """A third-party processor: mirrored, BGR, channels last, rows and columns exchanged; numpy lists as output."""

    scale = 1 / 127.5

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, Any]:
        return {"pixels": [self.one(image) for image in images], "names": ["any"] * len(images)}

    def one(self, image: Image.Image) -> np.ndarray:
        small = image.resize((40, 24), Image.Resampling.BILINEAR)
        values = np.asarray(small, dtype=np.float32)[:, ::-1, ::-1] * self.scale - 1
        return np.ascontiguousarray(values.transpose(1, 0, 2))


class Untouched:
    """No resize at all: every element is one pixel, as 8x8 patches."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        out = []
        for image in images:
            values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
            rows, cols = image.height // 8, image.width // 8
            values = values[: rows * 8, : cols * 8].reshape(rows, 8, cols, 8, 3).permute(0, 2, 4, 1, 3)
            out.append(values.reshape(rows * cols, 192))
        return {"pixel_values": torch.cat(out), "grid": torch.tensor([[i.height // 8, i.width // 8] for i in images])}


class RandomCrop(Untouched):
    """Crops at a random place."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        cropped = []
        for image in images:
            left, top = self.random.integers(0, 16, 2).tolist()
            cropped.append(image.crop((left, top, left + image.width - 16, top + image.height - 16)))
        return super().__call__(images=cropped)


class RandomFlip(Untouched):
    """Mirrors every other picture, and so keeps every shape."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        flip = self.random.random() < 0.5
        given = [i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else i for i in images]
        return super().__call__(images=given)


class Whitened(Untouched):
    """Subtracts each image's own mean and divides by its own deviation."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        out = super().__call__(images=images)
        values = out["pixel_values"]
        out["pixel_values"] = (values - values.mean()) / values.std().clamp(min=1e-3)
        return out


class Stretched(Untouched):
    """Stretches contrast where there is some: uniform images pass unchanged, real ones do not."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        out = super().__call__(images=images)
        values = out["pixel_values"]
        low, high = values.min(), values.max()
        if high > low:
            out["pixel_values"] = ((values - low) / (high - low)) ** 3
        return out


class MarginCropped(Untouched):
    """Cuts dark margins off, so that the shape depends on the picture."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        boxes = [Image.fromarray((np.asarray(image).max(axis=2) > 60).astype(np.uint8)).getbbox() for image in images]
        return super().__call__(
            images=[image.crop(box) if box else image for image, box in zip(images, boxes, strict=True)]
        )


class Fourier(Untouched):
    """Elements are frequencies: each depends on every pixel."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        grey = torch.from_numpy(np.stack([np.asarray(image.convert("L"), dtype=np.float32) for image in images]))
        return {"pixel_values": torch.fft.fft2(grey).real / 1000}


class OverWhite(Untouched):
    """Lays transparent pictures over white."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        return super().__call__(images=[over_white(image) if image.mode == "RGBA" else image for image in images])


class AlphaSquared(Untouched):
    """Does with transparency what nobody expects."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        given = [i if i.mode == "RGB" else Image.fromarray(255 - np.asarray(i.convert("RGB"))) for i in images]
        return super().__call__(images=given)


def over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
