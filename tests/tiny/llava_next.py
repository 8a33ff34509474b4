"""A tiny LLaVA-NeXT (1.6), on Mistral's decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

from tests.tiny.llama import IMAGE, PAD, build_llama_tokenizer, clip_config, llama_config, llama_generation
from tests.tiny.llava import TOWER
from tests.tiny.parts import Sizes, save, token_id

GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
"""The sizes an image may be scaled to, each of whole tiles of 56 pixels."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- ' [/INST]' -}}
{%- else -%}
{{- '</s> ' -}}
{%- endif -%}
{%- endfor -%}
"""


def build_llava_next(folder: Path, **overrides: Any) -> Path:
    """Write a LLaVA-NeXT checkpoint of about a million random weights into `folder` and return it; see `Sizes`."""
    sizes = Sizes(**overrides)
    tokenizer = build_llama_tokenizer(sizes)
    config = LlavaNextConfig(
        text_config=llama_config(sizes, "mistral"),
        vision_config=clip_config(sizes),
        image_token_index=token_id(tokenizer, IMAGE),
        image_grid_pinpoints=GRID,
        image_seq_length=16,
        tie_word_embeddings=sizes.tied,
    )
    setattr(config, "pad_token_id", token_id(tokenizer, PAD))  # noqa: B010 (the class does not declare it)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    model = LlavaNextForConditionalGeneration(config)
    return save(folder, sizes, model, processor, llama_generation(tokenizer), published=TOWER)
