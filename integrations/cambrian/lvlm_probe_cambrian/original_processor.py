"""The processor of a converted checkpoint: its tokenizer, the preparation of its towers, its prompt format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lvlm_probe_cambrian.configuration import CambrianConfig
from lvlm_probe_cambrian.image_processing import CambrianImageProcessor, tower_settings
from lvlm_probe_cambrian.processing import CHAT_TEMPLATES, CambrianProcessor
from lvlm_probe_cambrian.towers import image_size

__all__ = ["make_image_processor", "prompt_format", "write_processor"]


def make_image_processor(config: CambrianConfig) -> CambrianImageProcessor:
    """The image processor that fits a model."""
    towers = [tower_settings(part.model_type, image_size(part)) for part in config.vision_configs]
    return CambrianImageProcessor(towers, image_grid=config.image_grid)


def prompt_format(config: CambrianConfig) -> str:
    """The prompt format of a published model, by its decoder: Phi-3, or Llama with the vocabulary of Llama 3 or 2."""
    if config.text_config.model_type == "phi3":
        return "phi3"
    return "llama_3" if config.text_config.vocab_size > 100_000 else "vicuna_v1"


def write_processor(out: str | Path, *, tokenizer: str | Path, prompt: str | None = None) -> list[str]:
    """Writes the processor beside a converted model, and its image token into the model's configuration.

    Args:
        out: folder of the native model.
        tokenizer: folder with the tokenizer's files; also with the published ``config.json``, if there is one.
        prompt: one of ``CHAT_TEMPLATES``, by default ``prompt_format``.

    Returns:
        Sentences about what was found or could not be done.
    """
    config = CambrianConfig.from_pretrained(out)
    notes: list[str] = []
    loaded = _tokenizer(Path(tokenizer))
    if isinstance(loaded, str):
        make_image_processor(config).save_pretrained(out)
        return [f"no tokenizer could be read from {tokenizer} ({loaded}): the image processor alone was written"]
    known = loaded.get_vocab().get("<image>")
    if known is None:
        loaded.add_special_tokens({"additional_special_tokens": ["<image>"]})
        known = loaded.convert_tokens_to_ids("<image>")
    config.image_token_id = int(known)
    config.save_pretrained(out)
    chosen = prompt or prompt_format(config)
    processor = CambrianProcessor(make_image_processor(config), loaded, chat_template=CHAT_TEMPLATES[chosen])
    processor.save_pretrained(out)
    notes.append(f"wrote the processor with prompt format {chosen}; the image token is {known}")
    published = Path(tokenizer) / "config.json"
    if published.is_file():
        place = json.loads(published.read_text(encoding="utf-8")).get("image_position")
        if place is not None:
            notes.append(_compared(processor, int(place)))
    return notes


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or why there is none."""
    try:
        if (folder / "tokenizer.json").is_file():
            # Not through AutoTokenizer, which would ask for the folder's model type, unknown to transformers.
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its loaders raise; the model itself is written all the same
        return f"{type(error).__name__}: {error}"


def _compared(processor: CambrianProcessor, place: int) -> str:
    """Where the picture stands in this prompt, and where the published model was told that it stands."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    found = processor.tokenizer(text, add_special_tokens=special)["input_ids"].index(processor.image_token_id)
    if found == place:
        return f"the picture begins at position {place} of the prompt, as the published configuration has it"
    return (
        f"the picture begins at position {found} of this prompt, at {place} by the published configuration: the prompt "
        f"differs from the published one; give --prompt, or a chat template of your own"
    )
