"""ONNX graphs of the supported architectures, emitted operator by operator from a checkpoint's tensors.

Why the towers of CLIP, LLaVA, InternVL and BLIP-2 are not traced by `torch.onnx.export(dynamo=True)`, although its graphs of them
are right for any number of images, use standard operators alone and run about as fast (`benchmarks/results/onnx_dynamo.json`;
CLIP's of two blocks takes 1.7 times as long, where the hand-written one computes the last block for the class token alone): a
trace holds the whole tower in memory as floats, where a graph here reads each tensor from the mapped file; a linear's 4- or 8-bit
codes would have to be put in afterwards, by pattern, where they are taken from the checkpoint as they are; it takes ten times as
long, needs onnxscript, and may come out differently with the next release of torch or transformers.
"""

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
