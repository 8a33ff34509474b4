"""The onnx-genai format: the folder that onnxruntime-genai loads."""
