"""ONNX Runtime, in this process; its own server where latency is measured."""
