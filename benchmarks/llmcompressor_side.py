"""llm-compressor's half of awq_vs_llmcompressor.py; runs in llm-compressor's own environment and prints its seconds as JSON."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForImageTextToText


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=Path, required=True, help="a list of forward arguments, saved by torch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not torch.cuda.is_available():  # its cache asks for pinned memory, which needs a driver
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    batches: list[dict[str, torch.Tensor]] = torch.load(arguments.batches)
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0], shuffle=False)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=arguments.group_size)
    recipe = [
        AWQModifier(),
        QuantizationModifier(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["re:.*lm_head", "re:.*visual.*"],
        ),
    ]
    start, before = time.perf_counter(), time.process_time()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto")
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(batches))
    model.save_pretrained(arguments.output, save_compressed=True)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "processor_seconds": processor_seconds, "peak_host_bytes": peak}))


if __name__ == "__main__":
    main()
