"""Export a compressed checkpoint to a runtime's format."""

FORMATS = {
    # Before onnx: an onnxruntime-genai folder also has *.onnx files, so that the test for onnx would claim it.
    "onnx-genai": "compress.export.onnx_genai.format:OnnxGenai",
    "onnx": "compress.export.onnx.format:Onnx",
    # Last: it recognises every folder.
    "vllm": "compress.export.vllm.format:VllmExport",
}
"""The export formats a recipe can name: format → the class whose fields are its keys. A folder is of the first that recognises it:
one of onnxruntime-genai has ONNX graphs too, and what no other format claims is read as a checkpoint."""
