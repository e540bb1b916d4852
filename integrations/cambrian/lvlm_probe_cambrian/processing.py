"""Pictures and text to model inputs: every placeholder in the text becomes as many as its picture has tokens."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

__all__ = ["CHAT_TEMPLATES", "CambrianProcessor"]

_TURNS = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] -%}
{%- set system = said(first['content']) if first['role'] == 'system' else default_system -%}
{%- set turns = messages[1:] if first['role'] == 'system' else messages -%}
"""

# The prompts that the published models were trained with, down to their spaces.
_LLAMA_3 = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \\n    As a multimodal AI, you have "
    "the ability to process and analyze images. Whenever an image is present in the conversation, very carefully "
    "examine it and consider its content when formulating your response.\\n    You should give concise responses to "
    "very simple questions, but provide thorough responses to more complex and open-ended questions. "
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions."
)
_PHI_3 = "You are a helpful AI assistant."

CHAT_TEMPLATES = {
    "llama_3": "{%- set default_system = '"
    + _LLAMA_3
    + "' -%}"
    + _TURNS
    + """\
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>' + system + '<|eot_id|>' -}}
{%- for turn in turns -%}
{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>' + said(turn['content']) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif -%}""",
    "vicuna_v1": "{%- set default_system = '"
    + _VICUNA
    + "' -%}"
    + _TURNS
    + """\
{{- bos_token + system + ' ' -}}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}{{ 'USER: ' + said(turn['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + said(turn['content']) + '</s>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}""",
    "phi3": "{%- set default_system = '"
    + _PHI_3
    + "' -%}"
    + _TURNS
    + """\
{{- bos_token + '<|system|>\\n' + system + '<|end|>' -}}
{%- for turn in turns -%}{{ '\\n<|' + turn['role'] + '|>\\n' + said(turn['content']) + '<|end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n<|assistant|>\\n' }}{%- endif -%}""",
}
"""Chat templates by the name of the prompt format: of the 8B, 13B and 3B model."""


class CambrianProcessor(ProcessorMixin):
    """Image processor and tokenizer as one.

    Args:
        image_processor: a ``CambrianImageProcessor``.
        tokenizer: knows ``image_token`` as one token.
        chat_template: see ``CHAT_TEMPLATES``.
        image_token: placeholder of a picture in the text; the model's ``image_token_id`` is its id.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **_unused: Any,
    ) -> None:
        self.image_token = image_token
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer reads {image_token!r} as {len(ids)} tokens; add it as one: "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})"
            )
        self.image_token_id = int(ids[0])
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_unused: Any) -> str:
        """The placeholder as often as picture ``image_idx`` has tokens."""
        width, height = (int(value) for value in image_inputs["image_sizes"][image_idx])
        return self.image_token * int(self.image_processor.image_tokens((width, height)))
