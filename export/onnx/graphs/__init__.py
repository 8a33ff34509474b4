"""ONNX graphs of the supported architectures, emitted operator by operator from a checkpoint's tensors."""

from collections.abc import Mapping

_WRITE, _LLAMA = "compress.export.onnx.graphs.write", "compress.export.onnx.graphs.decoder:decoder"


def _generative(vision: str, decoder: str = _LLAMA) -> Mapping[str, str]:
    return {"vision_encoder": vision, "embed_tokens": f"{_WRITE}:embed_tokens", "decoder_model_merged": decoder}


GRAPHS: Mapping[str, Mapping[str, str]] = {
    "qwen2-vl": _generative("compress.export.onnx.graphs.qwen_vision:vision_encoder"),
    "qwen2.5-vl": _generative("compress.export.onnx.graphs.qwen_vision:vision_encoder"),
    "qwen3-vl": _generative("compress.export.onnx.graphs.qwen_vision:vision_encoder"),
    "llava": _generative("compress.export.onnx.graphs.llava:vision_encoder"),
    "llava-next": _generative("compress.export.onnx.graphs.llava_next:vision_encoder"),
    "internvl3": _generative("compress.export.onnx.graphs.internvl:vision_encoder"),
    "mllama": _generative("compress.export.onnx.graphs.mllama:vision_encoder", "compress.export.onnx.graphs.mllama:decoder"),
    "blip-2": _generative("compress.export.onnx.graphs.blip2:vision_encoder", "compress.export.onnx.graphs.opt:decoder"),
    "clip": {
        "vision_model": "compress.export.onnx.graphs.clip:vision_model",
        "text_model": "compress.export.onnx.graphs.clip:text_model",
    },
}
"""The graphs of each family, by the names of their files: the function that emits each, given a `LayerBuilder`."""
