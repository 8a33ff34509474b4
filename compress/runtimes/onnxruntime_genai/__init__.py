"""onnxruntime-genai, in its own environment."""
