"""lmms-eval and lm-evaluation-harness, in their own environments, asked for a task's items."""

ENVIRONMENTS = {"lmms": "lmms-eval", "lm": "lm-eval"}
"""The name of each harness's environment."""
