"""llm-compressor as a stage, in its own environment."""
