"""lmms-eval's side of `throughput`: a script for its environment that asks a server all of one task for each line it reads."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

TASK = """\
task: demo_scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {max_new_tokens}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
VISUAL = 'def visual(doc):\n    return [doc["image"]]\n'


def main(job: dict[str, Any]) -> None:
    """Load the task once; for each line, ask all of it and say how long it took and what was said."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenes.yaml").write_text(TASK.format(**job), encoding="utf-8")
    (folder / "scenes.py").write_text(VISUAL, encoding="utf-8")
    tasks: Any = import_module("lmms_eval.tasks")
    manager = tasks.TaskManager("INFO", include_path=str(folder), include_defaults=False, model_name="openai")
    task = tasks.get_task_dict(["demo_scenes"], manager, "chat")["demo_scenes"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=None, offset=0, rank=0, world_size=1)
    model = import_module("lmms_eval.models.chat.openai").OpenAICompatible(
        model=job["model"],
        base_url=f"{job['url']}/v1",
        api_key=os.environ["COMPRESS_BENCHMARK_KEY"],
        num_concurrent=job["concurrency"],
        adaptive_max_concurrency=job["concurrency"],
        httpx_trust_env=False,
    )
    model.task_dict["demo_scenes"] = task.dataset
    for _ in sys.stdin:
        began = time.perf_counter()
        found = model.generate_until(task.instances)
        taken = time.perf_counter() - began
        print(json.dumps({"seconds": taken, "said": [each.text for each in found]}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
