"""A tiny Qwen3-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.tiny.parts import Sizes, save
from tests.tiny.qwen import CHAT_TEMPLATE, build_tokenizer, generation, pixels, shared_config, text_config


def build_qwen3_vl(folder: Path, **overrides: Any) -> Path:
    """Write a Qwen3-VL checkpoint of about a million random weights into `folder` and return it; see `Sizes`.

    All blocks of the vision tower but every second feed blocks of the decoder, as far as those reach.
    """
    sizes = Sizes(**overrides)
    tokenizer = build_tokenizer(sizes)
    text = text_config(sizes, tokenizer, "qwen3_vl_text")
    text["head_dim"] = sizes.hidden // sizes.heads
    text["rope_parameters"]["mrope_interleaved"] = True
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": sizes.vision_blocks,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(0, sizes.vision_blocks, 2))[: sizes.layers - 1],
        },
        **shared_config(sizes, tokenizer),
    )
    model = Qwen3VLForConditionalGeneration(config)
    mean = [0.5, 0.5, 0.5]
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels(), patch_size=16, image_mean=mean, image_std=mean),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=pixels()),
        chat_template=CHAT_TEMPLATE,
    )
    return save(folder, sizes, model, processor, generation(tokenizer))
