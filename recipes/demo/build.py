"""The demo's architecture, tokenizer and processor, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

VOCABULARY = 1024
CONTEXT = 2048  # positions
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def build_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of at most 1,024 tokens, special tokens included, that splits words as Qwen2's."""
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    fields: dict[str, Any] = {
        "vocab": learned["vocab"],
        "merges": [tuple(merge) for merge in learned["merges"]],
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": list(SPECIAL_TOKENS),
        "model_max_length": CONTEXT,
    }
    return Qwen2Tokenizer(**fields)


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor for small images, with the chat template beside this file."""
    template = Path(__file__).with_name("chat_template.jinja").read_text()
    tokenizer.chat_template = template
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(PIXELS)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(PIXELS)),
        chat_template=template,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model in float32: every width a multiple of 64, six heads on two key-value heads, windows of 56 pixels."""
    token = tokenizer.convert_tokens_to_ids
    stop, pad = token("<|im_end|>"), token("<|endoftext|>")
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": pad,
        "eos_token_id": stop,
        "initializer_range": 0.05,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 192,
        "initializer_range": 0.05,
    }
    fields: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
        "bos_token_id": pad,
        "eos_token_id": stop,
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=pad, pad_token_id=pad, eos_token_id=[stop, pad], max_new_tokens=16
    )
    return model
