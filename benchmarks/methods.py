"""Every method on one model beside llm-compressor's, AutoRound and rounding to nearest: what each loses, same samples for all.

    compress runtime install llmcompressor      # prints that environment's python
    python -m benchmarks.methods --model recipes/demo/model --peer PYTHON --group-size 64 \
        --calibration-text wiki.valid.tokens --calibration-questions recipes/demo/calibration.parquet \
        --test-text wiki.test.tokens --test-questions recipes/demo/test.parquet --output benchmarks/results/methods.json

All are measured by this package's in-process runtime, which reads every side's checkpoints: the share of questions answered right,
and KL(original ‖ artifact) in nats per token of the original's own answers and of held-out text. Each row is the mean over
`--seeds` draws of calibration samples. `ratios` has each of this package's rows over each other side's row of the same comparison,
and over rounding to nearest in the same layout (`bits: auto`: over one width for all at the same size), with an interval over
draws and items; `processor_ratio` is our processor time over theirs. `--autoround` is the python of an environment with auto-round
0.16.1, torch 2.13.0 and transformers 5.17.0. `benchmarks/real_weights.py` makes a model with really trained weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import Judge, Quality, add_test_options, kl_ratio, mean_figures
from benchmarks.sides import Samples, run_autoround, run_ours, run_peer, take_samples, versions
from compress.checkpoints.checkpoint import open_checkpoint
from compress.files import write_json
from compress.hardware import describe

OURS = "compress"
NEAREST = "rtn"
FIXED = "gptq, one width"
BASELINES = (NEAREST, FIXED)
"""Rows of this package that its other rows of a comparison are set against; `FIXED` has the size of `bits: auto`."""

PEERS = {"llm-compressor": run_peer, "auto-round": run_autoround}


@dataclass(frozen=True)
class Row:
    """One method of one side."""

    comparison: str
    """Rows of one comparison have the same bits and layout: their KLs can be set against each other."""

    side: str
    method: str
    settings: dict[str, Any] | list[str]


def rows_of(group_size: int, widths: list[int], iterations: int) -> list[Row]:
    """Return what is compared."""
    rows: list[Row] = []
    for bits in widths:
        shape: dict[str, Any] = {"bits": bits, "group_size": group_size}
        options = ["--bits", str(bits), "--group-size", str(group_size)]
        for symmetric in (False, True):
            comparison = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
            grid = {**shape, "symmetric": symmetric}
            flags = [*options, *(["--symmetric"] if symmetric else [])]
            rows.append(Row(comparison, OURS, NEAREST, {"stage": "rtn", **grid}))
            rows.append(Row(comparison, OURS, "awq", {"stage": "awq", **grid}))
            rows.append(Row(comparison, OURS, "gptq", {"stage": "gptq", **grid, "scales": "none"}))
            rows.append(Row(comparison, OURS, "gptq with awq's scales", {"stage": "gptq", **grid, "scales": "awq"}))
            rows += [Row(comparison, "llm-compressor", method, ["--method", method, *flags]) for method in ("awq", "gptq")]
            rows.append(Row(comparison, "auto-round", f"auto-round, {iterations} steps", [*flags, "--iterations", str(iterations)]))
    rows.append(Row("int8", OURS, NEAREST, {"stage": "int8", "smoothing": "none", "rounding": "nearest"}))
    rows.append(Row("int8", OURS, "int8", {"stage": "int8"}))
    rows.append(Row("int8", OURS, "int8 without smoothing", {"stage": "int8", "smoothing": "none"}))
    rows.append(Row("int8", OURS, "int8, fixed input scales", {"stage": "int8", "activations": "tensor"}))
    rows.append(Row("int8", "llm-compressor", "int8", ["--method", "int8"]))
    rows.append(Row("int8", "llm-compressor", "int8 without smoothing", ["--method", "int8-plain"]))
    rows.append(Row("fp8", OURS, "fp8", {"stage": "fp8"}))
    rows.append(Row("fp8", "llm-compressor", "fp8", ["--method", "fp8"]))
    for bits in widths:
        # half the group size costs about a quarter of a bit at 64; that is what a width per layer may cost instead
        small = group_size // 2
        comparison = f"{bits} bits in groups of {small}, or as many bytes"
        size = {"bits_per_weight": bits + (16 + bits) / small}
        shape = {"bits": bits, "group_size": small, "symmetric": False}
        rows.append(Row(comparison, OURS, FIXED, {"stage": "gptq", **shape}))
        auto = {"bits": "auto", "group_size": group_size, "symmetric": False, "budget": size}
        rows.append(Row(comparison, OURS, "gptq, auto", {"stage": "gptq", **auto}))
    return rows


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        bench = _Bench(arguments, Path(name))
        for row in bench.rows():
            print(json.dumps(row), file=sys.stderr, flush=True)
            _write(bench)  # after every row: a run takes hours
    print(json.dumps(bench.ratios(), indent=2))


def _write(bench: _Bench) -> None:
    arguments = bench.arguments
    if not arguments.output:
        return
    result = {
        "what": "what each method loses: questions answered right, KL of answers and of held-out text",
        "model": {"name": arguments.name or arguments.model.name, "bytes": open_checkpoint(arguments.model).weight_bytes},
        "group_size": arguments.group_size,
        "draws": arguments.seeds,
        "calibration_tokens": bench.samples[0].tokens,
        "original": dict(bench.judge.original.figures),
        "rows": bench.described,
        "ratios": bench.ratios(),
        "machine": describe(),
        "versions": versions(arguments.peer) | versions(arguments.autoround, "auto-round"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", help="of the model, in the results")
    parser.add_argument("--peer", type=Path, help="python of the environment that has llm-compressor")
    parser.add_argument("--autoround", type=Path, help="python of an environment that has auto-round")
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round, per block; 200 is its default")
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--calibration-questions", type=Path, help="JSONL or parquet; none for text alone")
    add_test_options(parser)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--samples", type=int, default=64, help="of each kind of calibration sample")
    parser.add_argument("--tokens", type=int, default=512, help="per window of calibration text")
    parser.add_argument("--seeds", type=int, default=1, help="draws of calibration samples")
    parser.add_argument("--only", nargs="+", help="parts of the names of the comparisons or methods to make")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where what is made lies meanwhile")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


@dataclass
class _Bench:
    arguments: argparse.Namespace
    folder: Path
    judge: Judge = field(init=False)
    samples: list[Samples] = field(init=False)
    made: list[tuple[Row, list[Quality], list[dict[str, float]]]] = field(default_factory=list[Any])
    described: list[dict[str, Any]] = field(default_factory=list[Any])

    def __post_init__(self) -> None:
        options = self.arguments
        self.judge = Judge.of(options, self.folder)
        self.samples = [
            take_samples(
                options.model,
                options.calibration_text,
                options.calibration_questions,
                options.samples,
                options.tokens,
                self.folder / f"draw {seed}",
                seed,
            )
            for seed in range(options.seeds)
        ]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Make, measure and yield every row."""
        pythons = {"llm-compressor": self.arguments.peer, "auto-round": self.arguments.autoround}
        for row in rows_of(self.arguments.group_size, self.arguments.bits, self.arguments.iterations):
            wanted = self.arguments.only
            if wanted and not any(part in f"{row.comparison}: {row.method}" for part in wanted):
                continue
            if row.side != OURS and pythons[row.side] is None:
                continue
            qualities: list[Quality] = []
            runs: list[dict[str, float]] = []
            output = self.folder / "artifact"
            for samples in self.samples:
                if isinstance(row.settings, dict):
                    run = run_ours(row.settings, self.arguments.model, samples, output, self.arguments.threads)
                else:
                    run = PEERS[row.side](
                        pythons[row.side], row.settings, self.arguments.model, samples, output, self.arguments.threads
                    )
                runs.append(run)
                qualities.append(self.judge.measure(output))
            self.made.append((row, qualities, runs))
            figures = mean_figures(qualities) | {"processor_seconds": _processor_seconds(runs)}
            described = {"comparison": row.comparison, "side": row.side, "method": row.method, "settings": row.settings, **figures}
            described["draws"] = len(qualities)
            # what auto-round's side writes are plain weights
            size = {} if row.side == "auto-round" else {"weight_bytes": open_checkpoint(output).weight_bytes}
            self.described.append(described | size)
            yield self.described[-1]

    def ratios(self) -> list[dict[str, Any]]:
        """Return each of our rows over the others' rows of its comparison, and over the baselines."""
        found: list[dict[str, Any]] = []
        for ours, qualities, runs in self.made:
            for other, other_qualities, other_runs in self.made:
                baseline = other.side == OURS and other.method in BASELINES
                if ours.side != OURS or other is ours or ours.method in BASELINES or ours.comparison != other.comparison:
                    continue
                if other.side == OURS and not baseline:
                    continue
                found.append(
                    {
                        "comparison": ours.comparison,
                        "ours": ours.method,
                        "theirs": other.method if baseline else f"{other.side}'s {other.method}",
                        **{f"{task}_kl": kl_ratio(qualities, other_qualities, task) for task in qualities[0].kls},
                        "processor_ratio": _processor_seconds(runs) / _processor_seconds(other_runs),
                    }
                )
        return found


def _processor_seconds(runs: list[dict[str, float]]) -> float:
    return sum(run["processor_seconds"] for run in runs) / len(runs)


if __name__ == "__main__":
    main()
