"""Every method of compress on the demo model beside llm-compressor's and round-to-nearest: what each loses, same samples for all.

    compress runtime install llmcompressor      # prints that environment's python
    python -m benchmarks.methods --model recipes/demo/model --peer PYTHON --group-size 64 \
        --calibration-text wiki.valid.tokens --calibration-questions recipes/demo/calibration.parquet \
        --test-text wiki.test.tokens --test-questions recipes/demo/test.parquet --output benchmarks/results/methods.json

All are measured by this package's in-process runtime, which reads both sides' checkpoints: the share of questions answered right,
and KL(original ‖ artifact) in nats per token of the original's own answers and of held-out text. `ratio` is a method's KL over the
lowest of llm-compressor's same method and rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.sides import Samples, run_ours, run_peer, take_samples, versions
from compress.checkpoints.checkpoint import open_checkpoint
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import Measurement
from compress.eval.tasks.perplexity import Perplexity
from compress.eval.tasks.task import Task
from compress.eval.tasks.vqa import Vqa as Questions
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.runtime import Transformers


def rows_of(group_size: int) -> list[tuple[str, str, dict[str, Any] | list[str]]]:
    """Return what is compared: the comparison a row belongs to, the side, and its settings."""
    rows: list[tuple[str, str, dict[str, Any] | list[str]]] = []
    for bits in (4, 3):
        shape: dict[str, Any] = {"bits": bits, "group_size": group_size}
        options = ["--bits", str(bits), "--group-size", str(group_size)]
        for symmetric, method, flags in ((False, "awq", []), (True, "gptq", ["--symmetric"])):
            kind = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
            rows.append((f"rtn, {kind}", "compress", {"stage": "rtn", **shape, "symmetric": symmetric}))
            rows.append((f"{method}, {kind}", "compress", {"stage": method, **shape}))
            rows.append((f"{method}, {kind}", "llm-compressor", ["--method", method, *options, *flags]))
            own = {"stage": "gptq", **shape, "symmetric": symmetric, "scales": "awq"}
            rows.append((f"gptq with awq's scales, {kind}", "compress", own))
        rows.append((f"gptq, {bits} bits, asymmetric", "compress", {"stage": "gptq", **shape, "symmetric": False}))
    rows.append(("rtn, int8", "compress", {"stage": "int8", "smoothing": "none", "rounding": "nearest"}))
    rows.append(("int8", "compress", {"stage": "int8"}))
    rows.append(("int8", "llm-compressor", ["--method", "int8"]))
    rows.append(("int8 without smoothing", "compress", {"stage": "int8", "smoothing": "none"}))
    rows.append(("int8 without smoothing", "llm-compressor", ["--method", "int8-plain"]))
    rows.append(("int8, fixed input scales", "compress", {"stage": "int8", "activations": "tensor"}))
    rows.append(("fp8", "compress", {"stage": "fp8"}))
    rows.append(("fp8", "llm-compressor", ["--method", "fp8"]))
    for method in ("awq", "gptq"):
        own = {"stage": method, "bits": "auto", "group_size": group_size, "budget": {"bits_per_weight": 4.25}}
        rows.append((f"{method}, auto at 4.25 bits", "compress", own))
    return rows


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        samples = take_samples(
            arguments.model,
            arguments.calibration_text,
            arguments.calibration_questions,
            arguments.samples,
            arguments.tokens,
            folder,
        )
        bench = _Bench(arguments, folder, samples)
        rows = bench.rows()
    result = {
        "what": "what each method loses on the demo model: questions answered right, KL of answers and of held-out text",
        "model": {"name": arguments.model.name, "bytes": open_checkpoint(arguments.model).weight_bytes},
        "group_size": arguments.group_size,
        "calibration_tokens": samples.tokens,
        "rows": rows,
        "ratios": _ratios(rows),
        "machine": describe(),
        "versions": versions(arguments.peer),
    }
    print(json.dumps(result["ratios"], indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True, help="python of the environment that has llm-compressor")
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--calibration-questions", type=Path, required=True, help="JSONL or parquet")
    parser.add_argument("--test-text", type=Path, required=True)
    parser.add_argument("--test-questions", type=Path, required=True, help="JSONL or parquet")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="of each kind of calibration sample")
    parser.add_argument("--tokens", type=int, default=512, help="per window of text")
    parser.add_argument("--windows", type=int, default=64, help="of test text")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--only", help="a part of the names of the comparisons to make")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where what is made lies meanwhile")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


class _Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path, samples: Samples) -> None:
        self.arguments = arguments
        self.folder = folder
        self.samples = samples
        text, questions = (str(path.resolve()) for path in (arguments.test_text, arguments.test_questions))
        self.tasks: list[Task] = [
            Questions.model_validate(
                {"task": "vqa", "definition": "scenes", "source": questions, "samples": arguments.questions, "name": "questions"}
            ),
            Perplexity.model_validate(
                {
                    "task": "perplexity",
                    "dataset": "text",
                    "source": text,
                    "window": 512,
                    "samples": arguments.windows,
                    "name": "text",
                }
            ),
        ]
        self.data: dict[str, Sequence[Path]] = {"questions": (Path(questions),), "text": (Path(text),)}

    def rows(self) -> list[dict[str, Any]]:
        """Measure the original, then every row."""
        original = self._measure(self.arguments.model, "original")
        rows = [{"comparison": "original", **_figures(original), "bits_per_weight": 16.0}]
        threads, model = self.arguments.threads, self.arguments.model
        for place, (comparison, side, settings) in enumerate(rows_of(self.arguments.group_size)):
            if self.arguments.only and self.arguments.only not in comparison:
                continue
            output = self.folder / "artifact"
            if isinstance(settings, dict):
                run = run_ours(settings, model, self.samples, output, threads)
            else:
                run = run_peer(self.arguments.peer, settings, model, self.samples, output, threads)
            found = _figures(self._measure(output, str(place)))
            row = {"comparison": comparison, "side": side, "settings": settings, "seconds": run["seconds"], **found}
            rows.append({**row, "weight_bytes": open_checkpoint(output).weight_bytes})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        return rows

    def _measure(self, artifact: Path, name: str) -> Measurement:
        target = self.folder / "measured" / name
        against = None if name == "original" else self.folder / "measured" / "original"
        runtime = Transformers(runtime="transformers")
        with runtime.open(OpenContext.at(artifact=artifact, logs=self.folder, progress=Silent())) as session:
            context = MeasureContext(
                original_checkpoint=self.arguments.model,
                data=self.data,
                output_dir=target,
                original_measurement=against,
                progress=Silent(),
                logs=target,
            )
            return measure(session, self.tasks, context)


def _figures(measurement: Measurement) -> dict[str, float]:
    figures: dict[str, float] = {}
    for task in measurement.tasks:
        metrics = task.metrics
        figures |= {"accuracy": metrics.score} if metrics.task == "vqa" else {}
        figures |= {"perplexity": metrics.perplexity} if metrics.task == "perplexity" else {}
        if task.fidelity:
            figures[f"{task.name}_kl"] = task.fidelity.kl_mean
    return figures


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by comparison, our KL over the lower of llm-compressor's and of rounding to nearest at the same widths."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("side") != "compress":
            continue
        name = str(row["comparison"])
        nearest = "rtn, int8" if name.startswith("int8") else "rtn, " + name.partition(", ")[2]
        others = [other for other in rows if other.get("side") == "llm-compressor" and other["comparison"] == name]
        others += [other for other in rows if other["comparison"] == nearest and other is not row]
        if others:
            found[name] = {kind: row[kind] / min(other[kind] for other in others) for kind in ("text_kl", "questions_kl")}
    return found


if __name__ == "__main__":
    main()
