"""Decoders in ONNX Runtime: prefill and decode of this package's graphs beside PyTorch's and onnxruntime-genai's builder's.

    compress runtime install onnxruntime-genai
    python -m benchmarks.onnx_speed --output benchmarks/results/onnx_speed.json

Each decoder reads `--prompt` tokens (prefill, all logits) and then writes `--new` tokens (decode), one sample, its keys and values
in one buffer that is read and written in place. All of a model's decoders take turns, round by round, in one process; a ratio is
the median over the rounds of one's tokens per second over the other's in the same round. The builder reads the same checkpoint, and
its graph runs in the same ONNX Runtime. Random weights: `--shape` is the demo's or one block (or more) of a larger model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.speed import SHAPES
from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx_genai.format import OnnxGenai
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from compress.workers.environment import require
from tests.quantized import round_checkpoint
from tests.tiny import build_qwen2_5_vl

ORT: Any = onnxruntime
SCHEMES = {
    "int4": Scheme(4, 32, symmetric=False),
    "int8": Scheme(8, -1, symmetric=True, activations="token"),
    "int8 weights": Scheme(8, 32, symmetric=True),
}
PEERS = {"fp32": None, "int4": "int4", "int8 weights": "int8 weights"}
"""What the builder reads too: precision → the checkpoint."""


@dataclass(frozen=True)
class Work:
    """How many tokens are read, and how many are written after them."""

    prompt: int
    new: int


Run = Callable[[], tuple[float, float]]
"""Reads and writes once: the seconds of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["demo", "qwen2.5-vl-3b"])
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights of shapes")
    parser.add_argument("--layers", type=int, default=1, help="blocks of a shape other than the demo's")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-builder", action="store_true", help="leave onnxruntime-genai's builder out")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = Work(arguments.prompt, arguments.new)
    shapes: dict[str, Any] = {}
    for name in [arguments.model.name] if arguments.model else arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.model:
                model, shape = arguments.model, shape_of(arguments.model)
            else:
                shape = SHAPES[name] if name == "demo" else {**SHAPES[name], "layers": arguments.layers}
                model = build_qwen2_5_vl(Path(folder) / "model", **shape, spread=0.02)
            runs = make_runs(model, Path(folder), shape, work, arguments.threads, builder=not arguments.no_builder)
            shapes[name] = {"shape": shape, **measure(runs, work, arguments.rounds)}
        print(name, json.dumps(shapes[name]["ratios"], indent=2), file=sys.stderr)
    result = {
        "what": "decoders in ONNX Runtime: tokens per second of one sample, and ratios in the same round",
        "prompt": work.prompt,
        "new": work.new,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "shapes": shapes,
        "machine": describe(),
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "onnxruntime")},
            **({} if arguments.no_builder else {"builder": require("onnxruntime-genai").versions}),
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def shape_of(model: Path) -> dict[str, int]:
    """Return the shape of a checkpoint's decoder, under the names of `SHAPES`."""
    config = open_checkpoint(model).text_config
    return {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "layers": config["num_hidden_layers"],
    }


def make_runs(model: Path, folder: Path, shape: Mapping[str, int], work: Work, threads: int, *, builder: bool) -> dict[str, Run]:
    """Make every decoder of a model: ours, the builder's, PyTorch's."""
    sources = {"fp32": model}
    for name, scheme in SCHEMES.items():
        sources[name] = folder / name.replace(" ", "-")
        round_checkpoint(model, sources[name], scheme)
    runs: dict[str, Run] = {"PyTorch fp32": eager(model, work)}
    for name, source in sources.items():
        target = export(source, folder / f"ours-{source.name}", Onnx(format="onnx", dtype="float32"))
        runs[f"ours {name}"] = graph(target / "decoder_model_merged.onnx", shape, work, threads)
        if builder and name in PEERS:
            target = export(source, folder / f"builder-{source.name}", OnnxGenai(format="onnx-genai"))
            runs[f"builder {name}"] = graph(target / "model.onnx", shape, work, threads)
    return runs


def export(source: Path, target: Path, exporter: Onnx | OnnxGenai) -> Path:
    target.mkdir()
    family = family_of(open_checkpoint(source).config)
    exporter.apply(ExportContext(source, target, family, Silent()))
    return target


def graph(path: Path, shape: Mapping[str, int], work: Work, threads: int) -> Run:
    """Return what runs a decoder's graph, its cache read and written in place."""
    options = ORT.SessionOptions()
    options.intra_op_num_threads = threads
    session = ORT.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    width, room = shape["hidden"], work.prompt + work.new
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, room, width)).astype(np.float32)
    empty = np.zeros((1, shape["kv_heads"], room, width // shape["heads"]), np.float32)
    caches = [name for name in inputs if name.startswith("past_key_values")]
    held = {name: ORT.OrtValue.ortvalue_from_numpy(empty.copy()) for name in caches}

    def once(first: int, last: int) -> None:
        given: dict[str, Any] = {
            "inputs_embeds": embeds[:, first:last],
            "attention_mask": np.ones((1, last), np.int64),
            "position_ids": np.broadcast_to(np.arange(first, last), (3, 1, last - first)).copy(),
            "num_logits_to_keep": np.array(0),
        }
        binding = session.io_binding()
        for name in given.keys() & inputs.keys():
            binding.bind_ortvalue_input(name, ORT.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given[name])))
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)

    return lambda: timed(once, work)


def eager(model: Path, work: Work) -> Run:
    """Return what runs the model's own code in PyTorch, float32."""
    loaded: Any = load_model(OpenContext.at(model, model, Silent()), torch.float32, torch.device("cpu"))
    width = loaded.config.get_text_config().hidden_size
    embeds = torch.randn(1, work.prompt + work.new, width, generator=torch.Generator().manual_seed(0))
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def once(first: int, last: int) -> None:
        if first == 0:
            state.clear()
        positions = torch.arange(first, last).expand(3, 1, -1)
        found = loaded.model.language_model(
            inputs_embeds=embeds[:, first:last], position_ids=positions, past_key_values=state.get("cache"), use_cache=True
        )
        loaded.lm_head(found.last_hidden_state)
        state["cache"] = found.past_key_values

    return lambda: timed(once, work)


def timed(once: Callable[[int, int], None], work: Work) -> tuple[float, float]:
    start = time.perf_counter()
    once(0, work.prompt)
    middle = time.perf_counter()
    for place in range(work.prompt, work.prompt + work.new):
        once(place, place + 1)
    return middle - start, time.perf_counter() - middle


def measure(runs: Mapping[str, Run], work: Work, rounds: int) -> dict[str, Any]:
    """Let all take turns; return the medians of tokens per second, and the ratios that are asked for."""
    speeds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runs}
    for run in runs.values():
        run()
    for place in range(rounds):
        for name in list(runs)[:: 1 if place % 2 else -1]:
            prefill, decode = runs[name]()
            speeds[name]["prefill"].append(work.prompt / prefill)
            speeds[name]["decode"].append(work.new / decode)
    pairs = [(f"ours {name}", "PyTorch fp32") for name in ("fp32", *SCHEMES)]
    pairs += [(f"ours {name}", f"builder {name}") for name in PEERS if f"builder {name}" in runs]
    pairs += [(f"ours {name}", "ours fp32") for name in SCHEMES]
    return {
        "tokens_per_second": {
            name: {key: statistics.median(each) for key, each in found.items()} for name, found in speeds.items()
        },
        "ratios": {f"{one} / {other}": ratios(speeds[one], speeds[other]) for one, other in pairs},
    }


def ratios(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key in ("prefill", "decode"):
        each = [first / second for first, second in zip(one[key], other[key], strict=True)]
        found[key] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return found


if __name__ == "__main__":
    main()
