"""What is measured on an artifact, and what the measurements prove."""

TASKS = {
    "vqa": "compress.eval.vqa:Vqa",
    "zero-shot": "compress.eval.zero_shot:ZeroShot",
    "perplexity": "compress.eval.perplexity:Perplexity",
}
"""The tasks a recipe can name: task → the class whose fields are its keys."""
