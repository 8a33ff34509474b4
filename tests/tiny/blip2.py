"""A tiny BLIP-2 with OPT as its decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AddedToken,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
    GPT2Tokenizer,
)

from tests.tiny.parts import TEXT, Sizes, save, token_id

IMAGE, QUERIES = "<image>", 8


def build_blip2(folder: Path, **overrides: Any) -> Path:
    """Write a BLIP-2 checkpoint of about a million random weights into `folder` and return it; see `Sizes`.

    As published ones, it has no chat template, and its output head is always the embedding's own matrix.
    """
    sizes = Sizes(**overrides)
    tokenizer = _build_tokenizer(sizes)
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    config = cast("Callable[..., Blip2Config]", Blip2Config)(
        text_config={
            "model_type": "opt",
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "word_embed_proj_dim": sizes.hidden,
            "ffn_dim": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": sizes.context,
            "dropout": 0.0,
            "bos_token_id": token_id(tokenizer, "</s>"),
            "eos_token_id": newline,
            "pad_token_id": token_id(tokenizer, "<pad>"),
        },
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_hidden_layers": sizes.vision_blocks,
            "num_attention_heads": sizes.vision_heads,
            "image_size": 56,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": 32,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": sizes.vision_heads,
            "encoder_hidden_size": sizes.vision_hidden,
        },
        num_query_tokens=QUERIES,
        image_token_index=token_id(tokenizer, IMAGE),
        tie_word_embeddings=True,
    )
    processor = Blip2Processor(
        image_processor=BlipImageProcessor(size={"height": 56, "width": 56}), tokenizer=tokenizer, num_query_tokens=QUERIES
    )
    generation = GenerationConfig(
        bos_token_id=token_id(tokenizer, "</s>"), eos_token_id=newline, pad_token_id=token_id(tokenizer, "<pad>")
    )
    return save(folder, sizes, Blip2ForConditionalGeneration(config), processor, generation)


def _build_tokenizer(sizes: Sizes) -> GPT2Tokenizer:
    """Train GPT-2's tokenizer on `TEXT` with OPT's special tokens, the image's last; 32 rows of the embeddings have no token."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = sizes.vocabulary - 33
    trainer = BpeTrainer(
        vocab_size=pieces,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    build = cast("Callable[..., GPT2Tokenizer]", GPT2Tokenizer)  # its own annotations leave out what it takes
    tokenizer = build(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=sizes.context,
    )
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if len(tokenizer) != pieces + 1:
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {len(tokenizer)} tokens")
    return tokenizer
