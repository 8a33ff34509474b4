"""Tiny checkpoints with random weights, in every other way like published ones: config, tokenizer, processor, chat template."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

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

TEXT = """\
The river rises in the northern hills and runs for two hundred miles before it meets the sea. In the early years of the
last century, small boats carried timber, wool and stone between the market towns along its banks. A railway came later, and
with it the harbour lost most of its trade; today only a handful of fishing vessels remain. What colour is the largest
shape? How many circles, squares and triangles are there in the picture? Is there a red square beside the green circle?
Yes, no, one, two, three, four, five; blue, yellow, purple, orange, white, black. The castle, built by order of the king in
1284, was besieged twice during the civil war and has stood empty since 1651. Its keep, however, is still sound, and
visitors may climb the winding stair to look out over the valley. Scientists have measured the flow of the water every
summer since 1923 and found that it changes slowly with the weather of the preceding winter. The population of the district
was 48,367 at the most recent census. Several novels and at least one film were set here, among them a story of two
brothers who sail upstream in search of their father. Critics praised the photography but thought the second half too long.
"""


@dataclass(frozen=True)
class Sizes:
    """The shape of a tiny model; every field is a keyword of the builders."""

    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    layers: int = 3
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_heads: int = 2
    vision_blocks: int = 2
    vocabulary: int = 608
    context: int = 2048
    tied: bool = False
    seed: int = 0
    spread: float = 0.08
    dtype: torch.dtype = torch.bfloat16


def build_qwen2_5_vl(folder: Path, **overrides: Any) -> Path:
    """Write a Qwen2.5-VL checkpoint of about a million random weights into `folder` and return it; see `Sizes`."""
    sizes = Sizes(**overrides)
    tokenizer = build_tokenizer(sizes)
    config = Qwen2_5_VLConfig(
        text_config=_text_config(sizes, tokenizer, "qwen2_5_vl_text"),
        vision_config={
            "depth": sizes.vision_blocks,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "fullatt_block_indexes": [sizes.vision_blocks - 1],
        },
        **_shared_config(sizes, tokenizer),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_pixels()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=_pixels()),
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, sizes, model, processor)


def build_qwen2_vl(folder: Path, **overrides: Any) -> Path:
    """Write a Qwen2-VL checkpoint of about a million random weights into `folder` and return it; see `Sizes`."""
    sizes = Sizes(**overrides)
    tokenizer = build_tokenizer(sizes)
    config = Qwen2VLConfig(
        text_config=_text_config(sizes, tokenizer, "qwen2_vl_text"),
        vision_config={
            "depth": sizes.vision_blocks,
            "embed_dim": sizes.vision_hidden,
            "mlp_ratio": sizes.vision_intermediate // sizes.vision_hidden,
            "num_heads": sizes.vision_heads,
            "hidden_size": sizes.hidden,
        },
        **_shared_config(sizes, tokenizer),
    )
    model = Qwen2VLForConditionalGeneration(config)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_pixels()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=_pixels()),
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, sizes, model, processor)


def build_tokenizer(sizes: Sizes) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer on `TEXT`, exactly `vocabulary` tokens, split as Qwen2's, special tokens last."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=sizes.vocabulary - len(SPECIAL_TOKENS),
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
    )
    special: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    if len(tokenizer) != sizes.vocabulary:
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {len(tokenizer)} tokens")
    return tokenizer


def picture(seed: int, width: int = 112, height: int = 112) -> bytes:
    """Return a PNG of coarse random colour patches; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _text_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, model_type: str) -> dict[str, Any]:
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
        "bos_token_id": _id(tokenizer, "<|endoftext|>"),
        "eos_token_id": _id(tokenizer, "<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head // 2 - 2 * side, side, side],
        },
    }


def _shared_config(sizes: Sizes, tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "image_token_id": _id(tokenizer, "<|image_pad|>"),
        "video_token_id": _id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _id(tokenizer, "<|vision_end|>"),
        "tie_word_embeddings": sizes.tied,
    }


def _pixels() -> dict[str, int]:
    return {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}


def _id(tokenizer: Qwen2Tokenizer, token: str) -> int:
    return cast("int", tokenizer.convert_tokens_to_ids(token))


def _save(folder: Path, sizes: Sizes, model: PreTrainedModel, processor: Qwen2_5_VLProcessor | Qwen2VLProcessor) -> Path:
    _fill(model, sizes)
    tokenizer = cast("Any", processor).tokenizer
    model.generation_config = (
        GenerationConfig(  # the values published with Qwen2.5-VL: greedy decoding must not take up the penalty
            bos_token_id=_id(tokenizer, "<|endoftext|>"),
            pad_token_id=_id(tokenizer, "<|endoftext|>"),
            eos_token_id=[_id(tokenizer, "<|im_end|>"), _id(tokenizer, "<|endoftext|>")],
            do_sample=True,
            repetition_penalty=1.05,
            temperature=1e-6,
        )
    )
    model.config.architectures = [type(model).__name__]
    cast("torch.nn.Module", model).to(sizes.dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _fill(model: PreTrainedModel, sizes: Sizes) -> None:
    """Draw every weight anew: matrices that pass a signal on, uneven norms and biases that are not zero, as trained ones are."""
    generator = torch.Generator().manual_seed(sizes.seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * sizes.spread)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(torch.exp(noise * 0.5))
