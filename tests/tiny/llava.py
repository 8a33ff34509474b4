"""A tiny LLaVA 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tests.tiny.llama import IMAGE, PAD, build_llama_tokenizer, clip_config, llama_config, llama_generation
from tests.tiny.parts import Sizes, save, token_id

TOWER = (r"^vision_tower\.", "vision_tower.vision_model.")
"""The name the tower has in published checkpoints, which transformers no longer writes."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}
{{- message['role'].upper() + ': ' -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] + ' ' -}}
{%- else -%}
{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] + ' ' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def build_llava(folder: Path, *, text: Mapping[str, Any] | None = None, **overrides: Any) -> Path:
    """Write a LLaVA 1.5 checkpoint of about a million random weights into `folder` and return it; see `Sizes`.

    `text` changes keys of the decoder's config; with another `model_type` it is an architecture of its own.
    """
    sizes = Sizes(**overrides)
    tokenizer = build_llama_tokenizer(sizes)
    config = LlavaConfig(
        text_config=llama_config(sizes, "llama") | dict(text or {}),
        vision_config=clip_config(sizes),
        image_token_index=token_id(tokenizer, IMAGE),
        image_seq_length=16,
        tie_word_embeddings=sizes.tied,
    )
    setattr(config, "pad_token_id", token_id(tokenizer, PAD))  # noqa: B010 (the class does not declare it)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    model = LlavaForConditionalGeneration(config)
    return save(folder, sizes, model, processor, llama_generation(tokenizer), published=TOWER)
