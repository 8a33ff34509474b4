"""A tiny Llama 3.2 Vision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AddedToken,
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)

from tests.tiny.parts import TEXT, Sizes, save, token_id

SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
"""The last of them has no row in the output head."""

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<|image|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def build_mllama(folder: Path, **overrides: Any) -> Path:
    """Write a Llama 3.2 Vision checkpoint of about a million random weights into `folder` and return it; see `Sizes`.

    Every third block, from the second on, is one of cross-attention.
    """
    sizes = Sizes(**overrides)
    tokenizer = _build_tokenizer(sizes)
    special = {
        "bos_token_id": token_id(tokenizer, "<|begin_of_text|>"),
        "eos_token_id": [token_id(tokenizer, token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
        "pad_token_id": token_id(tokenizer, "<|finetune_right_pad_id|>"),
    }
    config = MllamaConfig(
        text_config={
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "cross_attention_layers": list(range(1, sizes.layers, 3)),
            "max_position_embeddings": sizes.context,
            "tie_word_embeddings": sizes.tied,
            **special,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 512,
            },
        },
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "attention_heads": sizes.vision_heads,
            "num_hidden_layers": sizes.vision_blocks,
            "num_global_layers": 2,
            "intermediate_layers_indices": list(range(sizes.vision_blocks)[-2:]),
            "vision_output_dim": sizes.vision_hidden * (1 + len(range(sizes.vision_blocks)[-2:])),
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
        },
        image_token_index=token_id(tokenizer, "<|image|>"),
    )
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    generation = GenerationConfig(**special, do_sample=True, temperature=0.6, top_p=0.9)
    return save(folder, sizes, MllamaForConditionalGeneration(config), processor, generation)


def _build_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `TEXT`, `vocabulary` tokens and the one for images, split as Llama 3's."""
    trained = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    pieces = sizes.vocabulary + 1 - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXT.splitlines(), BpeTrainer(vocab_size=pieces, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    )
    trained.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    begin = SPECIAL_TOKENS[0]
    trained.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, trained.token_to_id(begin))]
    )
    if trained.get_vocab_size() != sizes.vocabulary + 1:
        found = json.dumps(trained.get_vocab_size())
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {found} tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=sizes.context,
    )
