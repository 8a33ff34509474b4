"""llm-compressor's side of a benchmark: one method on one model, timed; runs in llm-compressor's own environment.

    compress runtime install llmcompressor      # prints that environment's python
    PYTHON benchmarks/peer.py --method gptq --bits 4 --group-size 128 --symmetric \
        --model recipes/demo/model --batches batches.pt --output out --threads 2

`--batches` is a list of the model's forward arguments as torch saves it: as many samples to a batch as one likes, but without
padding, which the library counts as tokens. Those with images go first and the others get theirs as None: the library takes
the first batch's inputs for those that all have, and would drop the images of every later one in silence.

Methods (the decoder's linears alone, as published checkpoints have it; `--blocks` says where its blocks are):
    awq         AWQModifier with its default duo scaling, then rounding, in `--bits` and groups of `--group-size`
    gptq        GPTQModifier, static activation order, dampening 0.01
    rtn         rounding to nearest, without samples
    int8        SmoothQuantModifier of strength 0.8, then GPTQModifier W8A8: weights per channel, activations per token
    int8-plain  the same without SmoothQuantModifier
    fp8         weights per channel, activations per token, without samples

The last line printed is JSON: `seconds` from opening the checkpoint to the last byte of the new one, imports left out;
`processor_seconds` of all threads; `peak_host_bytes`, the largest resident size of the process, with `imported_host_bytes` of it
before the model was opened; `peak_device_bytes`, the most that tensors took on the GPU, 0 where there is none.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForImageTextToText

METHODS = ("awq", "gptq", "rtn", "int8", "int8-plain", "fp8")
STRENGTH = 0.8
DAMPENING = 0.01
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
NORMS = (("input_layernorm", ATTENTION), ("post_attention_layernorm", GATED))
LINEARS = (("self_attn.v_proj", ("self_attn.o_proj",)), ("mlp.up_proj", ("mlp.down_proj",)))


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    if not cuda:  # its cache asks for pinned memory, which needs a driver
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    loader = _loader(arguments.batches)
    imported = _resident()
    start, before = time.perf_counter(), time.process_time()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto")
    oneshot(
        model=model,
        dataset=loader,
        recipe=_recipe(arguments),
        num_calibration_samples=len(loader),
        sequential_targets=sorted({type(block).__name__ for block in model.get_submodule(arguments.blocks)}),
    )
    model.save_pretrained(arguments.output, save_compressed=True)
    if cuda:
        torch.cuda.synchronize()
    result = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - before,
        "peak_host_bytes": _resident(),
        "imported_host_bytes": imported,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=int, default=4, help="of awq, gptq and rtn")
    parser.add_argument("--group-size", type=int, default=128, help="of awq, gptq and rtn; -1: a scale per output channel")
    parser.add_argument("--symmetric", action="store_true", help="of awq, gptq and rtn")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=Path, required=True, help="a list of forward arguments, saved by torch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--blocks", default="model.language_model.layers", help="the decoder's blocks in the model")
    return parser.parse_args()


def _loader(path: Path) -> Any:
    batches: list[dict[str, torch.Tensor]] = torch.load(path)
    keys = sorted({key for batch in batches for key in batch})
    filled = [{key: batch.get(key) for key in keys} for batch in sorted(batches, key=len, reverse=True)]
    return torch.utils.data.DataLoader(filled, batch_size=1, collate_fn=lambda rows: rows[0], shuffle=False)


def _recipe(arguments: argparse.Namespace) -> list[Any]:
    outside = [rf"re:(?!{re.escape(arguments.blocks)}\.)"]
    if arguments.method == "fp8":
        return [QuantizationModifier(scheme="FP8_DYNAMIC", ignore=outside)]
    if arguments.method in ("int8", "int8-plain"):
        smooth = [SmoothQuantModifier(smoothing_strength=STRENGTH, mappings=_smoothquant_mappings(arguments.blocks))]
        gptq = GPTQModifier(scheme="W8A8", actorder="static", dampening_frac=DAMPENING, ignore=outside)
        return [*(smooth if arguments.method == "int8" else []), gptq]
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=_weights(arguments))}
    if arguments.method == "gptq":
        return [GPTQModifier(config_groups=groups, actorder="static", dampening_frac=DAMPENING, ignore=outside)]
    rounding = QuantizationModifier(config_groups=groups, ignore=outside)
    return [rounding] if arguments.method == "rtn" else [AWQModifier(mappings=_awq_mappings(arguments.blocks)), rounding]


def _weights(arguments: argparse.Namespace) -> QuantizationArgs:
    per_channel = arguments.group_size == -1
    return QuantizationArgs(
        num_bits=arguments.bits,
        type="int",
        symmetric=arguments.symmetric,
        strategy="channel" if per_channel else "group",
        group_size=None if per_channel else arguments.group_size,
    )


def _smoothquant_mappings(blocks: str) -> list[Any]:
    return [[[_pattern(blocks, linear) for linear in linears], _pattern(blocks, norm)] for norm, linears in NORMS]


def _awq_mappings(blocks: str) -> list[Any]:
    return [
        AWQMapping(_pattern(blocks, source), [_pattern(blocks, linear) for linear in linears])
        for source, linears in (*NORMS, *LINEARS)
    ]


def _pattern(blocks: str, module: str) -> str:
    """Match one module of each decoder block: the library's own patterns would take in vision layers of the same names."""
    return rf"re:{re.escape(blocks)}\.\d+\.{re.escape(module)}$"


def _resident() -> int:
    """Return the largest resident size of this process so far, in bytes; that of getrusage counts the parent's at the start."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
