"""What onnxruntime-genai reads beside the graphs: `genai_config.json`, and how images become patches.

Formats: https://onnxruntime.ai/docs/genai/reference/config.html, and the image operations of
https://github.com/microsoft/onnxruntime-extensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.checkpoint import read_json_object
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.onnx_genai_limits import KINDS

if TYPE_CHECKING:
    from compress.export.onnx_genai import OnnxGenai

VISION, EMBEDDING, DECODER = "vision_encoder", "embeddings", "decoder_model_merged"
"""The graphs' names; those of vision and decoder are as in the table of graphs."""

DECODER_OF_BUILDER = "model.onnx"
PROCESSOR = "vision_processor.json"

_INTERPOLATIONS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
"""The names of Pillow's filters that onnxruntime-extensions has, by their numbers."""

_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""What generation_config.json may say of decoding, and what holds where it does not."""


def genai_config(export: OnnxGenai, context: ExportContext, config: Any, decoder: str, width: int) -> dict[str, Any]:
    """Return `genai_config.json` for a checkpoint whose config (transformers' object) is `config`.

    `decoder` is the decoder's file, `width` that of the embeddings that travel between the graphs.

    Raises:
        CheckpointError: nothing says which token ends an answer.
    """
    text, vision = config.get_text_config(), config.vision_config
    path = context.source / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}

    def token(name: str) -> Any:
        places = (generation.get(name), getattr(text, name, None), getattr(config, name, None))
        return next((place for place in places if place is not None), None)

    end = token("eos_token_id")
    if end is None:
        raise CheckpointError(
            f"{context.source}: no eos_token_id says which token ends an answer; add it to generation_config.json"
        )
    first_end = cast("list[int]", end)[0] if isinstance(end, list) else int(end)
    pad = token("pad_token_id")
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        "provider_options": [{"cuda": {}}] if export.dtype == "float16" else [],
        "session.x64quantprecision": "1",  # older CPUs add products of 8 bits in 16, which overflows
    }
    heads = int(text.num_attention_heads)
    model: dict[str, Any] = {
        "type": KINDS[context.family.name].type,
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": first_end if pad is None else int(pad),
        "image_token_id": int(config.image_token_id),
        "video_token_id": int(config.video_token_id),
        "vision_start_token_id": int(config.vision_start_token_id),
        "vocab_size": int(text.vocab_size),
        "context_length": int(text.max_position_embeddings),
        "decoder": {
            "filename": decoder,
            "session_options": session,
            "head_size": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            "hidden_size": width,
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
        # The grids' name is left out: all images are one run then, whatever their sizes, and nothing depends on how a version's
        # loop over images, which it enters otherwise, finds each one's patches among those that fill up.
        "vision": {
            "filename": f"{VISION}.onnx",
            "config_filename": PROCESSOR,
            "spatial_merge_size": int(vision.spatial_merge_size),
            "patch_size": int(vision.patch_size),
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
    }
    search = {name: generation.get(name, usual) for name, usual in _SEARCH.items()}
    lengths = {"max_length": int(text.max_position_embeddings), "past_present_share_buffer": True}
    if model["bos_token_id"] is None:
        del model["bos_token_id"]
    return {"model": model, "search": {**search, **lengths}}


def processor_config(processor: Any, source: Path) -> dict[str, Any]:
    """Return the operations by which onnxruntime-extensions makes patches of images as a checkpoint's `processor` does.

    Raises:
        CheckpointError: the processor does something that it has no operation for.
    """
    where = f"{source}/preprocessor_config.json"
    left_out = [name for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, name, True)]
    if left_out:
        raise CheckpointError(f"{where}: {left_out[0]} is false, and onnxruntime-genai always does it; use format: onnx")
    resample = int(processor.resample)
    if resample not in _INTERPOLATIONS:
        raise CheckpointError(f"{where}: resample {resample} has no like in onnxruntime-extensions; use format: onnx")
    size = cast("dict[str, int]", dict(processor.size))
    grid = {"patch_size": int(processor.patch_size), "merge_size": int(processor.merge_size)}
    operations: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        (
            "Resize",
            {
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
