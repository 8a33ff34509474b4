"""A tiny InternVL3, in transformers' own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from tests.tiny.parts import Sizes, save, token_id
from tests.tiny.qwen import SPECIAL_TOKENS, build_tokenizer, generation

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SIDE = {"height": 56, "width": 56}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif part['type'] == 'video' -%}
{{- '<video>\\n' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_internvl(folder: Path, **overrides: Any) -> Path:
    """Write an InternVL3 checkpoint of about a million random weights into `folder` and return it; see `Sizes`."""
    sizes = Sizes(**overrides)
    tokenizer = build_tokenizer(sizes, (*SPECIAL_TOKENS, *IMAGE_TOKENS.values()), IMAGE_TOKENS)
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": sizes.context,
            "tie_word_embeddings": sizes.tied,
            "bos_token_id": token_id(tokenizer, "<|endoftext|>"),
            "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        },
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_hidden_layers": sizes.vision_blocks,
            "num_attention_heads": sizes.vision_heads,
            "attention_bias": True,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=token_id(tokenizer, IMAGE_TOKENS["context_image_token"]),
        image_seq_length=4,
        tie_word_embeddings=sizes.tied,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=SIDE),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE,
    )
    return save(folder, sizes, InternVLForConditionalGeneration(config), processor, generation(tokenizer))
