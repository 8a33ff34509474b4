"""vLLM, started as a user starts it: `vllm serve` in its own environment, asked over the OpenAI API."""
