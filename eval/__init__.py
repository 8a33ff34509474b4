"""What is measured on an artifact, and what the measurements prove."""

TASKS = {
    "vqa": "compress.eval.tasks.vqa:Vqa",
    "choice": "compress.eval.tasks.choice:Choice",
    "caption": "compress.eval.tasks.caption:Caption",
    "zero-shot": "compress.eval.tasks.zero_shot:ZeroShot",
    "retrieval": "compress.eval.tasks.retrieval:Retrieval",
    "perplexity": "compress.eval.tasks.perplexity:Perplexity",
    "adapter": "compress.eval.tasks.adapter:Adapter",
}
"""The tasks a recipe can name: task → the class whose fields are its keys."""
