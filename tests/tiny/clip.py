"""A tiny CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, GenerationConfig

from tests.tiny.parts import TEXT, Sizes, save

_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_CONTEXT = 77


def build_clip(folder: Path, **overrides: Any) -> Path:
    """Write a CLIP checkpoint of about half a million random weights into `folder` and return it; see `Sizes`.

    As published ones, it holds the numbers of the positions among its tensors, and its context is of 77 tokens.
    """
    fields: dict[str, Any] = {"context": _CONTEXT, **overrides}
    sizes = Sizes(**fields)
    tokenizer = _build_tokenizer(sizes)
    config = CLIPConfig(
        text_config={
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": sizes.context,
            "projection_dim": sizes.vision_hidden,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_hidden_layers": sizes.vision_blocks,
            "num_attention_heads": sizes.vision_heads,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": sizes.vision_hidden,
        },
        projection_dim=sizes.vision_hidden,
    )
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), tokenizer=tokenizer
    )
    model = CLIPModel(config)
    save(folder, sizes, model, processor, GenerationConfig())
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, count in (("text_model", sizes.context), ("vision_model", 17)):
        tensors[f"{name}.embeddings.position_ids"] = torch.arange(count).unsqueeze(0)
    tensors["logit_scale"] = torch.tensor(2.6592, dtype=sizes.dtype)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _build_tokenizer(sizes: Sizes) -> CLIPTokenizer:
    """Train CLIP's tokenizer on `TEXT`, exactly `vocabulary` tokens, those of a text's start and end last."""
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*bytes_, *(f"{byte}</w>" for byte in bytes_)]
    merges = sizes.vocabulary - len(base) - 2
    trainer = BpeTrainer(
        vocab_size=len(base) + merges, min_frequency=1, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    kept = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"][:merges]]
    tokens = [*base, *(f"{left}{right}" for left, right in kept), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    build = cast("Callable[..., CLIPTokenizer]", CLIPTokenizer)  # its own annotations leave out what it takes
    tokenizer = build(vocab=vocabulary, merges=kept, model_max_length=sizes.context)
    if len(vocabulary) != sizes.vocabulary:
        raise ValueError(f"TEXT is too short for a vocabulary of {sizes.vocabulary}: it gives {len(vocabulary)} tokens")
    return tokenizer
