"""The vllm format: compressed-tensors, AWQ and GPTQ layouts."""
