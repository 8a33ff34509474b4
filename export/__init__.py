"""Export a compressed checkpoint to a runtime's format."""

FORMATS = {
    "onnx": "compress.export.onnx:Onnx",
    "onnx-genai": "compress.export.onnx_genai:OnnxGenai",
    "vllm": "compress.export.vllm:VllmExport",
}
"""The export formats a recipe can name: format → the class whose fields are its keys."""
