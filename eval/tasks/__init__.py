"""The tasks, one class each."""
