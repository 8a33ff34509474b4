"""A family's record from a model's own code, for architectures without one."""
