"""What is measured on an artifact, and what the measurements prove."""

TASKS = {
    "vqa": "compress.eval.vqa:Vqa",
    "choice": "compress.eval.choice:Choice",
    "caption": "compress.eval.caption:Caption",
    "zero-shot": "compress.eval.zero_shot:ZeroShot",
    "retrieval": "compress.eval.retrieval:Retrieval",
    "perplexity": "compress.eval.perplexity:Perplexity",
    "adapter": "compress.eval.adapter:Adapter",
}
"""The tasks a recipe can name: task → the class whose fields are its keys."""
