"""The configuration files of an onnxruntime-genai folder: `genai_config.json` and the image processor's operations.

Formats: https://onnxruntime.ai/docs/genai/reference/config.html, and the image operations of
https://github.com/microsoft/onnxruntime-extensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.checkpoints.special_tokens import read_if_there, required_end_tokens
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.onnx_genai.limits import MODEL_TYPES

if TYPE_CHECKING:
    from compress.export.onnx_genai.format import OnnxGenai

VISION, EMBEDDING, DECODER = "vision_encoder", "embeddings", "decoder_model_merged"
"""The graphs' names; those of vision and decoder are keys of `GRAPHS`."""

DECODER_OF_BUILDER = "model.onnx"
PROCESSOR = "vision_processor.json"

_INTERPOLATIONS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
"""onnxruntime-extensions' names of Pillow's resampling filters, by number."""

_SEARCH_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""The search options that are taken from generation_config.json, with their defaults."""


def genai_config(export: OnnxGenai, context: ExportContext, config: Any, decoder: str, width: int) -> dict[str, Any]:
    """Return `genai_config.json` for a checkpoint whose config (transformers' object) is `config`.

    `decoder` is the decoder's file name, `width` that of the embeddings between the graphs, DeepStack columns included.

    Raises:
        CheckpointError: no file names an end-of-sequence token.
    """
    text, vision = config.get_text_config(), config.vision_config
    generation = read_if_there(context.source, "generation_config.json")

    # generation_config.json first: chat models end answers with other tokens than the base model's config.json names.
    def token(name: str) -> Any:
        candidates = (generation.get(name), getattr(text, name, None), getattr(config, name, None))
        return next((candidate for candidate in candidates if candidate is not None), None)

    ends, pad = required_end_tokens(context.source), token("pad_token_id")
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        # float16 graphs are for GPUs; without CUDA the runtime here clears the providers.
        "provider_options": [{"cuda": {}}] if export.dtype == "float16" else [],
        "session.x64quantprecision": "1",  # on CPUs without VNNI, int8 products would saturate in 16 bits
    }
    heads = int(text.num_attention_heads)
    model: dict[str, Any] = {
        "type": MODEL_TYPES[context.family.name].type,
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        # onnxruntime-genai wants a pad token; padded positions are masked, so that any id serves.
        "pad_token_id": ends[0] if pad is None else int(pad),
        "image_token_id": int(config.image_token_id),
        "video_token_id": int(config.video_token_id),
        "vision_start_token_id": int(config.vision_start_token_id),
        "vocab_size": int(text.vocab_size),
        "context_length": int(text.max_position_embeddings),
        "decoder": {
            "filename": decoder,
            "session_options": session,
            "head_size": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            "hidden_size": width,  # the library allocates the embeddings between the graphs by this number
            "num_attention_heads": heads,
            "num_hidden_layers": int(text.num_hidden_layers),
            "num_key_value_heads": int(getattr(text, "num_key_value_heads", None) or heads),
            "inputs": {
                **{name: name for name in ("inputs_embeds", "attention_mask", "position_ids")},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        },
        "embedding": {
            "filename": f"{EMBEDDING}.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        # Without the name of the grids input all images are one run, whatever their sizes. With it, onnxruntime-genai loops over
        # images, and versions differ in how they find an image's patches among the padding.
        "vision": {
            "filename": f"{VISION}.onnx",
            "config_filename": PROCESSOR,
            "spatial_merge_size": int(vision.spatial_merge_size),
            "patch_size": int(vision.patch_size),
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
    }
    search = {name: generation.get(name, default) for name, default in _SEARCH_DEFAULTS.items()}
    # One buffer for past and present keys: nothing is copied from step to step.
    lengths = {"max_length": int(text.max_position_embeddings), "past_present_share_buffer": True}
    if model["bos_token_id"] is None:
        del model["bos_token_id"]
    return {"model": model, "search": {**search, **lengths}}


def processor_config(processor: Any, source: Path) -> dict[str, Any]:
    """Return onnxruntime-extensions' image operations that are equivalent to a checkpoint's `processor`.

    Raises:
        CheckpointError: the processor does something for which there is no operation.
    """
    path = f"{source}/preprocessor_config.json"
    # A step that is left out there changes every pixel: refused, as no difference would be seen before answers differ.
    disabled = [name for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, name, True)]
    if disabled:
        raise CheckpointError(f"{path}: {disabled[0]} is false, and onnxruntime-genai always does it; use format: onnx")
    resample = int(processor.resample)
    if resample not in _INTERPOLATIONS:
        raise CheckpointError(f"{path}: resample {resample} has no like in onnxruntime-extensions; use format: onnx")
    size = cast("dict[str, int]", dict(processor.size))
    grid = {"patch_size": int(processor.patch_size), "merge_size": int(processor.merge_size)}
    operations: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        (
            "Resize",
            {
                # Qwen's rule: sides become multiples of patch · merge, within the two limits on pixels.
                "smart_resize": 1,
                "interpolation": _INTERPOLATIONS[resample],
                "min_pixels": int(size["shortest_edge"]),
                "max_pixels": int(size["longest_edge"]),
                **grid,
            },
        ),
        ("Rescale", {"rescale_factor": float(processor.rescale_factor)}),
        (
            "Normalize",
            {"mean": [float(value) for value in processor.image_mean], "std": [float(value) for value in processor.image_std]},
        ),
        ("PatchImage", {"temporal_patch_size": int(processor.temporal_patch_size), **grid}),
    ]
    transforms = [{"operation": {"name": kind.lower(), "type": kind, "attrs": attributes}} for kind, attributes in operations]
    return {"processor": {"name": "image_processor", "transforms": transforms}}
