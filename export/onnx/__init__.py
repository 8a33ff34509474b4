"""The onnx format: one ONNX graph per component."""
