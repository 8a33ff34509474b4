"""What the Qwen models share: their tokenizer, chat template, and the config of a decoder with rotary positions in sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, GenerationConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

from tests.tiny.parts import TEXT, Sizes, token_id

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
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


def build_tokenizer(
    sizes: Sizes, special_tokens: Sequence[str] = SPECIAL_TOKENS, named: Mapping[str, str] | None = None
) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer on `TEXT`, exactly `vocabulary` tokens, split as Qwen2's, special tokens last.

    `named` are special tokens that are attributes of the tokenizer too, as processors of other families read them.
    """
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=sizes.vocabulary - len(special_tokens),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    build = cast("Callable[..., Qwen2Tokenizer]", Qwen2Tokenizer)  # its own annotations leave out what it takes
    tokenizer = build(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=sizes.context,
        **({"extra_special_tokens": dict(named)} if named else {}),
    )
    special: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    tokenizer.add_tokens(special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens[1:])})
    if len(tokenizer) != sizes.vocabulary:
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {len(tokenizer)} tokens")
    return tokenizer


def text_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, model_type: str) -> dict[str, Any]:
    """Return the config of a decoder."""
    head = sizes.hidden // sizes.heads
    side = 3 * head // 16  # as published: 16, 24, 24 of a head of 128
    return {
        "model_type": model_type,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": token_id(tokenizer, "<|endoftext|>"),
        "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head // 2 - 2 * side, side, side],
        },
    }


def shared_config(sizes: Sizes, tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Return what stands at the top of a config."""
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
        "tie_word_embeddings": sizes.tied,
    }


def pixels() -> dict[str, int]:
    """Return how many pixels an image may have."""
    return {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}


def generation(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    """Return the values published with Qwen2.5-VL: greedy decoding must not take up the penalty."""
    return GenerationConfig(
        bos_token_id=token_id(tokenizer, "<|endoftext|>"),
        pad_token_id=token_id(tokenizer, "<|endoftext|>"),
        eos_token_id=[token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=1e-6,
    )
