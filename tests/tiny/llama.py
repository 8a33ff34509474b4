"""What models on Llama's or Mistral's decoder share: a tokenizer of pieces with byte fallback, the decoder's config, generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, GenerationConfig, LlamaTokenizer

from tests.tiny.parts import TEXT, Sizes, token_id

IMAGE, PAD = "<image>", "<pad>"
UNUSED = 32
"""How many rows of the embeddings no token has: published ones are padded for speed."""


def build_llama_tokenizer(sizes: Sizes) -> LlamaTokenizer:
    """Train a tokenizer on `TEXT`: `<unk>`, `<s>`, `</s>`, 256 bytes, the pieces; image and padding tokens last."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(BPE(byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    pieces = sizes.vocabulary - UNUSED - 2
    trained.train_from_iterator(
        TEXT.splitlines(), BpeTrainer(vocab_size=pieces, min_frequency=1, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    build = cast("Callable[..., LlamaTokenizer]", LlamaTokenizer)  # its own annotations leave out what it takes
    tokenizer = build(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token=AddedToken(PAD, special=True, normalized=False),
        add_bos_token=True,
        model_max_length=sizes.context,
        extra_special_tokens={"image_token": IMAGE},
    )
    if len(tokenizer) != pieces + 2:
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {len(tokenizer)} tokens")
    return tokenizer


def llama_config(sizes: Sizes, model_type: str) -> dict[str, Any]:
    """Return the config of a decoder."""
    return {
        "model_type": model_type,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def clip_config(sizes: Sizes) -> dict[str, Any]:
    """Return the config of a CLIP vision tower of 16 patches."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_hidden_layers": sizes.vision_blocks,
        "num_attention_heads": sizes.vision_heads,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": sizes.vision_hidden,
    }


def llama_generation(tokenizer: LlamaTokenizer) -> GenerationConfig:
    """Return what is published with LLaVA."""
    return GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=token_id(tokenizer, PAD))
