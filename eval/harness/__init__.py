"""lmms-eval and lm-evaluation-harness, in their own environments, asked for a task's items."""
