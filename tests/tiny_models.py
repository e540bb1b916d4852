"""Tiny vision-language models of the real transformers classes, with real processors, built in memory.

Each family is an unmodified ``…ForConditionalGeneration`` with two or three decoder layers, 32 to 64 hidden units and
random weights, plus the family's own ``ProcessorMixin`` (PIL image processor, a byte-level tokenizer
written out here, a chat template). Nothing is downloaded and torchvision is not needed.

Two traps these builders avoid. transformers' default initialisation gives several families nearly constant outputs
(zero gates in mllama, a zero projector in gemma3), so that every test about images would pass vacuously: matrices are
re-drawn from N(0, 1/fan_in), gates opened, norms jittered. And ``AutoProcessor`` needs torchvision for the families
that also take videos: ``load_processor`` then puts the processor together without its video half.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

__all__ = [
    "FAMILIES",
    "NAMES",
    "build",
    "build_model",
    "build_processor",
    "inputs",
    "load_processor",
    "loop",
    "picture",
    "save",
]

_TEXT = (
    "What Where How many is in on of to the a there are picture image colour shape square circle triangle red blue "
    "green yellow left right two shows Describe this USER ASSISTANT"
)
_SPECIAL = ("<pad>", "<bos>", "<eos>")
_TOWER = 56  # tower image size: 4 x 4 patches of 14 pixels


@dataclass(frozen=True)
class _Family:
    """What differs between families: special tokens, the image slot of the chat template, and two constructors."""

    tokens: tuple[str, ...]
    slot: str
    model: Callable[[dict[str, int]], Any]
    processor: Callable[[PreTrainedTokenizerFast], Any]
    named: dict[str, str]


def make_tokenizer(family: _Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 450 entries: any text tokenises, and common words are one piece.

    Vocabulary and merges are written out, not trained: training breaks ties differently in every process.
    """
    pieces = [*_SPECIAL, *family.tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in _TEXT.split():
        for spelled in (f"\u0120{word}", word):  # U+0120 is how ByteLevel writes a leading space
            for stop in range(1, len(spelled)):
                if spelled[: stop + 1] not in vocabulary:
                    vocabulary[spelled[: stop + 1]] = len(vocabulary)
                    merges.append((spelled[:stop], spelled[stop]))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=family.named,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    return tokenizer


def make_chat_template(slot: str) -> str:
    return (
        "<bos>{% for message in messages %}{{ message['role'] | upper }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + slot + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def text_config(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    """A text sub-config: 3 layers, 4 query heads over 2 key heads (grouped-query attention), 48 hidden units."""
    return {
        "vocab_size": 640,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
        **overrides,
    }


LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
"""The blocks of a tower, in the names that most families share."""
SQUARE_TOWER = {**LAYERS, "image_size": _TOWER, "patch_size": 14}


def clip_config(**overrides: Any) -> dict[str, Any]:
    return {**SQUARE_TOWER, "projection_dim": 32, **overrides}


def pil_image_processor(class_name: str, **kwargs: Any) -> Any:
    return getattr(transformers, class_name)(**kwargs)


def without_video(processor_class: Any) -> Any:
    """The same processor class with no video half, which needs torchvision.

    ``ProcessorMixin`` derives its parts from ``get_attributes``: leaving the video processor out there is enough for
    ``__init__``, ``__call__``, ``save_pretrained`` and ``from_pretrained``.
    """
    parts = [part for part in processor_class.get_attributes() if part != "video_processor"]
    namespace = {"get_attributes": classmethod(lambda _: list(parts)), "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), namespace)


def video_family(
    class_name: str, video_class_name: str, image_processor: Any, tokenizer: PreTrainedTokenizerFast, **kwargs: Any
) -> Any:
    processor_class = getattr(transformers, class_name)
    if not is_torchvision_available():
        return without_video(processor_class)(image_processor, tokenizer, **kwargs)
    return processor_class(image_processor, tokenizer, getattr(transformers, video_class_name)(), **kwargs)


def square(side: int = _TOWER) -> dict[str, int]:
    return {"height": side, "width": side}


_PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _llava(ids: dict[str, int]) -> Any:
    # One more multi-head variant: the language model of LLaVA-1.5 has as many key heads as query heads.
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **clip_config()},
        text_config={"model_type": "llama", **text_config(ids, num_key_value_heads=4)},
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    return transformers.LlavaProcessor(
        pil_image_processor("CLIPImageProcessorPil", size={"shortest_edge": _TOWER}, crop_size=square()),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next(ids: dict[str, int]) -> Any:
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **clip_config()},
        text_config={"model_type": "mistral", **text_config(ids, sliding_window=None)},
        image_token_index=ids["<image>"],
        image_grid_pinpoints=_PINPOINTS,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _llava_next_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    return transformers.LlavaNextProcessor(
        pil_image_processor(
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": _TOWER},
            crop_size=square(),
            image_grid_pinpoints=_PINPOINTS,
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision(ids: dict[str, int]) -> Any:
    tower = {**clip_config(), "model_type": "siglip_vision_model", "vision_use_head": False}
    tower.pop("projection_dim")
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower,
        text_config={"model_type": "qwen2", **text_config(ids)},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    return video_family(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionVideoProcessor",
        pil_image_processor("LlavaOnevisionImageProcessorPil", size=square(), image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _qwen_text(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    return text_config(ids, hidden_size=64, head_dim=16, rope_parameters=rope, **overrides)


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_vl(ids: dict[str, int]) -> Any:
    text = _qwen_text(ids)
    text["rope_parameters"].pop("mrope_interleaved")
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **_qwen_ids(ids))
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(ids: dict[str, int]) -> Any:
    text = _qwen_text(ids)
    text["rope_parameters"].pop("mrope_interleaved")
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids(ids))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(ids: dict[str, int]) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=_qwen_text(ids), **_qwen_ids(ids))
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen_processor(
    class_name: str, video_class_name: str = "Qwen2VLVideoProcessor", patch_size: int = 14
) -> Callable[[PreTrainedTokenizerFast], Any]:
    def make(tokenizer: PreTrainedTokenizerFast) -> Any:
        pixels = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
        image_processor = pil_image_processor("Qwen2VLImageProcessorPil", size=pixels, patch_size=patch_size)
        return video_family(class_name, video_class_name, image_processor, tokenizer)

    return make


def _gemma3(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        hidden_size=48,
        head_dim=12,
        num_hidden_layers=3,
        sliding_window=8,  # shorter than any prompt here: the window really cuts
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=12,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _TOWER,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gemma3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    image_processor = pil_image_processor("Gemma3ImageProcessorPil", size=square(), image_seq_length=4)
    return transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4)


def _internvl(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [_TOWER, _TOWER],
        "patch_size": [14, 14],
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **text_config(ids)},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _internvl_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    image_processor = pil_image_processor("GotOcr2ImageProcessorPil", size=square(), max_patches=4)
    return video_family("InternVLProcessor", "InternVLVideoProcessor", image_processor, tokenizer, image_seq_length=4)


def _idefics3(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _TOWER,
        "patch_size": 14,
    }
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=ids["<pad>"],
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _idefics3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    image_processor = pil_image_processor(
        "Idefics3ImageProcessorPil", size={"longest_edge": 2 * _TOWER}, max_image_size={"longest_edge": _TOWER}
    )
    return transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4)


def _mllama(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "attention_heads": 2,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": _TOWER,
        "patch_size": 14,
        "max_num_tiles": 4,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    text = text_config(ids, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids["<|image|>"])
    return transformers.MllamaForConditionalGeneration(config)


def _mllama_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    image_processor = pil_image_processor("MllamaImageProcessorPil", size=square(), max_image_tiles=4)
    return transformers.MllamaProcessor(image_processor, tokenizer)


def _paligemma(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _TOWER,
        "patch_size": 14,
        "projection_dim": 48,
        "vision_use_head": False,
        "model_type": "siglip_vision_model",
    }
    # The processor adds 1,152 location and segmentation tokens of its own after the vocabulary.
    text = {"model_type": "gemma", **text_config(ids, head_dim=12, vocab_size=1800)}
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        projection_dim=48,
        hidden_size=48,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _paligemma_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    image_processor = pil_image_processor("SiglipImageProcessorPil", size=square(), image_seq_length=16)
    return transformers.PaliGemmaProcessor(image_processor, tokenizer)


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
_INTERNVL_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_GEMMA_NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)

FAMILIES: dict[str, _Family] = {
    "llava": _Family(("<image>",), "<image>\n", _llava, _llava_processor, {"image_token": "<image>"}),
    "llava_next": _Family(("<image>",), "<image>\n", _llava_next, _llava_next_processor, {"image_token": "<image>"}),
    "llava_onevision": _Family(
        ("<image>", "<video>"),
        "<image>\n",
        _llava_onevision,
        _llava_onevision_processor,
        {"image_token": "<image>", "video_token": "<video>"},
    ),
    "qwen2_vl": _Family(_QWEN_TOKENS, _QWEN_SLOT, _qwen2_vl, _qwen_processor("Qwen2VLProcessor"), {}),
    "qwen2_5_vl": _Family(_QWEN_TOKENS, _QWEN_SLOT, _qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor"), {}),
    "qwen3_vl": _Family(
        _QWEN_TOKENS, _QWEN_SLOT, _qwen3_vl, _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16), {}
    ),
    "gemma3": _Family(tuple(_GEMMA_NAMED.values()), "<start_of_image>", _gemma3, _gemma3_processor, dict(_GEMMA_NAMED)),
    "internvl": _Family(
        tuple(_INTERNVL_NAMED.values()), "<IMG_CONTEXT>\n", _internvl, _internvl_processor, dict(_INTERNVL_NAMED)
    ),
    "idefics3": _Family(_IDEFICS_TOKENS, "<image>", _idefics3, _idefics3_processor, {}),
    "mllama": _Family(("<|image|>", "<|python_tag|>"), "<|image|>", _mllama, _mllama_processor, {}),
    "paligemma": _Family(("<image>",), "<image>", _paligemma, _paligemma_processor, {"image_token": "<image>"}),
}

NAMES: tuple[str, ...] = tuple(FAMILIES)


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int) -> None:
    """Draw every matrix from N(0, 1/fan_in), open the gates, jitter norms and biases: all paths carry signal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.rsplit(".", 1)[-1].endswith("gate"):
            parameter.fill_(0.5)
        elif parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            embedding = parameter.dim() == 2 and "embed" in name
            experts = parameter.dim() == 3 and "experts" in name  # a stack of matrices, not a kernel
            fan_in = parameter.shape[1] if embedding else parameter.shape[-1] if experts else parameter[0].numel()
            parameter.copy_(noise / math.sqrt(fan_in))


def build_processor(name: str) -> Any:
    """The family's own processor, PIL backend, with tokenizer and chat template."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    processor = family.processor(tokenizer)
    processor.chat_template = make_chat_template(family.slot)
    return processor


def build_model(name: str, *, seed: int = 0, attn_implementation: str | None = None) -> Any:
    """The family's model: float32, eval mode, weights fixed by ``seed``."""
    return build(name, seed=seed, attn_implementation=attn_implementation)[0]


def build(name: str, *, seed: int = 0, attn_implementation: str | None = None) -> tuple[Any, Any]:
    """Build ``(model, processor)`` of one family of ``NAMES``; a fresh pair per call, the same weights per seed."""
    family = FAMILIES[name]
    processor = build_processor(name)
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(seed)  # some vectors (CLIP's class token) are drawn at construction
    try:
        model = family.model(processor.tokenizer.get_vocab())
    finally:
        torch.random.set_rng_state(state)
    redraw(model, seed)
    model = model.float().eval()
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    generation = model.generation_config
    generation.bos_token_id = processor.tokenizer.bos_token_id
    generation.eos_token_id = processor.tokenizer.eos_token_id
    generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.do_sample = False
    return model, processor


def save(name: str, directory: str | Path, *, seed: int = 0) -> Path:
    """Save model and processor with ``save_pretrained``: a stand-in for a user's own model directory."""
    directory = Path(directory)
    model, processor = build(name, seed=seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def load_processor(directory: str | Path) -> Any:
    """``AutoProcessor``; without torchvision, the same processor class minus its video half."""
    try:
        return AutoProcessor.from_pretrained(directory)
    except (ImportError, OSError):  # OSError: saved without its video half
        if is_torchvision_available():
            raise
    settings = json.loads((Path(directory) / "processor_config.json").read_text())
    return without_video(getattr(transformers, settings["processor_class"])).from_pretrained(directory)


@cache
def _gradient(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return Image.fromarray((fine[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), "RGB")


def picture(width: int = 90, height: int = 60, *, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture, the same for the same arguments."""
    return _gradient(width, height, seed).copy()


def inputs(
    name: str,
    model: Any,
    processor: Any,
    images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
    question: str | Sequence[str],
) -> BatchFeature:
    """Model inputs through the chat template and the real ``ProcessorMixin.__call__``, on the model's device.

    One prompt: a list of images and a string. A batch, left-padded: a list of image lists and a list of strings.
    """
    single = isinstance(question, str)
    rows: list[list[Any]] = [list(images)] if single else [list(row) for row in images]  # type: ignore[arg-type]
    questions = [question] if single else list(question)
    texts = []
    for row, text in zip(rows, questions, strict=True):
        content = [*({"type": "image"} for _ in row), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    given: Any = rows if name in ("gemma3", "idefics3", "mllama", "paligemma") else [im for row in rows for im in row]
    batch = processor(images=given, text=texts, return_tensors="pt", padding=True, padding_side="left")
    return batch.to(model.device)


class _Again(torch.nn.Module):
    """A layer once more in the same pass, with a cache of its own."""

    def __init__(self, layer: torch.nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attention: Any = self.layer.self_attn
        before, attention.layer_idx = attention.layer_idx, self.index
        try:
            return self.layer(*args, **kwargs)
        finally:
            attention.layer_idx = before


def loop(model: Any, numbers: Sequence[int]) -> None:
    """Have the decoder run layers that follow on each other twice in each pass, as Inkling 2 Loop does."""
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    more = [_Again(layers[number], len(layers) + k) for k, number in enumerate(numbers)]
    stop = numbers[-1] + 1
    decoder.layers = torch.nn.ModuleList([*layers[:stop], *more, *layers[stop:]])
    decoder.config.num_hidden_layers = len(decoder.layers)
    decoder.config.layer_types = ["full_attention"] * len(decoder.layers)
