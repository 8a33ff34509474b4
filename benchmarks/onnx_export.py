"""Exporting a decoder to ONNX: seconds and peak memory of this package beside onnxruntime-genai's model builder.

    compress runtime install onnxruntime-genai
    python -m benchmarks.onnx_export --layers 8 --output benchmarks/results/onnx_export.json

Each run is a process of its own, its imports left out of the time but not of the memory; the sides take turns, round by round. Both
make the embeddings' and the decoder's graphs, ours the vision encoder's too. Random weights of the 3B shape, in bfloat16; 4 bits
start from a checkpoint that is quantized, which the builder is given as it reads it (AWQ's layout).
`--alone` is for a decoder whose builder would not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.speed import SHAPES
from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.workers.environment import require
from tests.quantized import round_checkpoint
from tests.tiny import build_qwen2_5_vl

RESIDENT = """
def resident():
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def spent(start, before, imported):
    import time
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": resident(), "imported_bytes": imported}
"""

OURS = (
    RESIDENT
    + """
import json, sys, time
from pathlib import Path
import compress.export.onnx.graphs.decoder, compress.export.onnx.graphs.qwen_vision, compress.export.onnx.graphs.write
from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_of
from compress.progress import Silent
source, target, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
imported, start, before = resident(), time.perf_counter(), time.process_time()
target.mkdir()
family = family_of(open_checkpoint(source).config)
Onnx(format="onnx", dtype=dtype).apply(ExportContext(source, target, family, Silent()))
print(json.dumps(spent(start, before, imported)))
"""
)

THEIRS = (
    RESIDENT
    + """
import contextlib, json, runpy, sys, tempfile, time
import torch, transformers
from onnxruntime_genai.models import builder
source, target, precision, *options = sys.argv[1:]
imported, start, before = resident(), time.perf_counter(), time.process_time()
sys.argv = ["builder", "-i", source, "-o", target, "-p", precision, "-e", "cpu", "-c", tempfile.mkdtemp()]
sys.argv += ["--extra_options", *options]
with contextlib.redirect_stdout(sys.stderr):
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
print(json.dumps(spent(start, before, imported)))
"""
)
OPTIONS = {
    "fp32": ["exclude_embeds=true"],
    "int4": ["exclude_embeds=true", "nodes_to_exclude=/lm_head/MatMul", "shared_embeddings=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; without one random weights of Qwen2.5-VL-3B's shape")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=128, help="of the integers")
    parser.add_argument("--precisions", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without the builder")
    parser.add_argument("--work", type=Path, help="where the model and what is made of it lie meanwhile")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shape = {**SHAPES["qwen2.5-vl-3b"], "layers": arguments.layers}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        model = arguments.model or build_qwen2_5_vl(folder / "model", **shape, spread=0.02)
        for precision in arguments.precisions:
            scheme = Scheme(4, arguments.group_size, symmetric=False)
            rounds = 1 if arguments.alone else arguments.rounds
            rows[precision] = measure(model, folder, precision, scheme, rounds, alone=arguments.alone)
            told = {key: value for key, value in rows[precision].items() if key != "runs"}
            print(precision, json.dumps(told), file=sys.stderr)
    result = {
        "what": "exporting a decoder to ONNX: seconds and peak memory",
        "model": {"name": arguments.model.name} if arguments.model else {"random": "qwen2.5-vl-3b", **shape},
        "precisions": rows,
        "machine": describe(),
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "onnx")},
            **({} if arguments.alone else {"builder": require("onnxruntime-genai").versions}),
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure(model: Path, folder: Path, precision: str, scheme: Scheme, rounds: int, *, alone: bool) -> dict[str, Any]:
    """Export one precision on both sides, in turn; return every run, and medians of the ratios."""
    source = theirs = model
    if precision == "int4":
        source, theirs = folder / "quantized", folder / "awq"
        round_checkpoint(model, source, scheme)
        theirs.mkdir()
        family = family_of(open_checkpoint(source).config)
        VllmExport(format="vllm", layout="awq").apply(ExportContext(source, theirs, family, Silent()))
    runs: dict[str, list[dict[str, float]]] = {"compress": [], "builder": []}
    for _ in range(rounds):
        runs["compress"].append(run(Path(sys.executable), OURS, folder, [str(source)], ["float32"]))
        if not alone:
            python = require("onnxruntime-genai").python
            runs["builder"].append(run(python, THEIRS, folder, [str(theirs)], [precision, *OPTIONS[precision]]))
    weights = open_checkpoint(source).weight_bytes
    dense = 2 * weights if precision == "fp32" else weights
    own = {key: statistics.median(each[key] for each in runs["compress"]) for key in runs["compress"][0]}
    found: dict[str, Any] = {"runs": runs, "written_weights_bytes": dense, "peak_over_weights": own["peak_bytes"] / dense}
    found["peak_beyond_imports_over_weights"] = (own["peak_bytes"] - own["imported_bytes"]) / dense
    for key in ("seconds", "processor_seconds", "peak_bytes"):
        pairs = zip(runs["compress"], runs["builder"], strict=False)
        if ratios := [one[key] / other[key] for one, other in pairs]:
            found[f"{key}_ratio"] = statistics.median(ratios)
    return found


def run(python: Path, program: str, folder: Path, before: list[str], after: list[str]) -> dict[str, float]:
    """Export once in a process of its own; what it writes is removed."""
    target = folder / "out"
    command = [str(python), "-c", program, *before, str(target), *after]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
