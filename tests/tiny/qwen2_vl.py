"""A tiny Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from tests.tiny.parts import Sizes, save
from tests.tiny.qwen import CHAT_TEMPLATE, build_tokenizer, generation, pixels, shared_config, text_config


def build_qwen2_vl(folder: Path, **overrides: Any) -> Path:
    """Write a Qwen2-VL checkpoint of about a million random weights into `folder` and return it; see `Sizes`."""
    sizes = Sizes(**overrides)
    tokenizer = build_tokenizer(sizes)
    config = Qwen2VLConfig(
        text_config=text_config(sizes, tokenizer, "qwen2_vl_text"),
        vision_config={
            "depth": sizes.vision_blocks,
            "embed_dim": sizes.vision_hidden,
            "mlp_ratio": sizes.vision_intermediate // sizes.vision_hidden,
            "num_heads": sizes.vision_heads,
            "hidden_size": sizes.hidden,
        },
        **shared_config(sizes, tokenizer),
    )
    model = Qwen2VLForConditionalGeneration(config)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels()),
        chat_template=CHAT_TEMPLATE,
    )
    return save(folder, sizes, model, processor, generation(tokenizer))
