"""Quantization: the methods, and the walk over a model's blocks that they share."""
