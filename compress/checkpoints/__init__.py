"""Checkpoints on disk: headers, configs, quantization configs, tokenizer files; free of torch except where tensors are packed."""
