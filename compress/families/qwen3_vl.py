"""Qwen3-VL (arXiv 2511.21631): features of inner blocks of the vision tower are added between the decoder's first blocks."""

from dataclasses import replace

from compress.families.family import ScalePair
from compress.families.qwen2_vl import QWEN2_VL

QWEN3_VL = replace(
    QWEN2_VL,
    name="qwen3-vl",
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    # its published checkpoints have the module names of transformers 5
    renames=(),
    # in the order they run: the deepstack mergers between the blocks, the merger after them
    projector=("model.visual.deepstack_merger_list", "model.visual.merger"),
    vision_scale_pairs=(ScalePair("norm1", ("attn.qkv",)), ScalePair("norm2", ("mlp.linear_fc1",))),
    # transformers 5 reads no other key for this architecture
    tied_by=("tie_word_embeddings",),
)
