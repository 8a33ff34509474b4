"""Export a compressed checkpoint to a runtime's format."""

FORMATS = {
    "onnx": "compress.export.onnx.format:Onnx",
    "onnx-genai": "compress.export.onnx_genai.format:OnnxGenai",
    "vllm": "compress.export.vllm.format:VllmExport",
}
"""The export formats a recipe can name: format → the class whose fields are its keys."""
