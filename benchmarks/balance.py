"""Text-only and image-only calibration, and calibration on both with each balance of the two, side by side.

    python -m benchmarks.balance --model recipes/demo/model \
        --calibration-text recipes/demo/calibration.txt --calibration-questions recipes/demo/calibration.parquet \
        --test-text recipes/demo/test.txt wiki.test.tokens --test-questions recipes/demo/test.parquet \
        --output benchmarks/results/balance.json

The decoder's linears are rounded with the same settings each time; what differs is which samples the statistics are of, and how
text and vision tokens are weighed in them (`balance`). Measured are, in the in-process runtime, the share of questions answered
right, and KL(original ‖ artifact) in nats per token of the original's answers to them and of held-out texts. Each row is the mean
over `--seeds` drawings of the calibration samples, with the standard deviation over them beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import Judge, add_test_options
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.checkpoint import open_checkpoint
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.runtimes.transformers.runtime import Transformers
from compress.stages.quantization.awq import Awq
from compress.stages.quantization.gptq import Gptq
from compress.stages.stage import StageContext

STAGES: dict[str, type[Awq] | type[Gptq]] = {"awq": Awq, "gptq": Gptq}
SETTINGS = (
    ("text only", "tokens"),
    ("images only", "tokens"),
    ("both", "tokens"),
    ("both", 0.25),
    ("both", 0.5),
    ("both", 0.75),
    ("both", "auto"),
)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        rows = _Bench(arguments, Path(name), Judge.of(arguments, Path(name))).rows()
    result = {
        "what": "calibration on text, images and both, by balance: accuracy and KL of held-out questions and texts",
        "model": arguments.model.name,
        "group_size": arguments.group_size,
        "samples": {"questions": arguments.samples, "windows": arguments.samples // 4, "tokens": arguments.tokens},
        "seeds": arguments.seeds,
        "rows": rows,
        "machine": describe(),
        "versions": {**Transformers(runtime="transformers").versions(), **Gptq.model_construct().versions()},
    }
    print(_table(rows))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--calibration-questions", type=Path, required=True, help="JSONL or parquet")
    add_test_options(parser)
    parser.add_argument("--methods", nargs="+", choices=sorted(STAGES), default=["gptq", "awq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="of questions; a quarter as many windows of text")
    parser.add_argument("--tokens", type=int, default=256, help="per window of text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class _Bench:
    arguments: argparse.Namespace
    folder: Path
    judge: Judge

    def rows(self) -> list[dict[str, Any]]:
        """Measure every setting."""
        rows: list[dict[str, Any]] = []
        for method in self.arguments.methods:
            for bits in self.arguments.bits:
                for samples, balance in SETTINGS:
                    start = time.perf_counter()
                    found = [self._one(method, bits, samples, balance, seed) for seed in range(self.arguments.seeds)]
                    row = {"method": method, "bits": bits, "samples": samples, "balance": balance, **_joined(found)}
                    rows.append(row)
                    print(json.dumps(row), f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return rows

    def _one(self, method: str, bits: int, samples: str, balance: float | str, seed: int) -> dict[str, float]:
        calibration = self._calibration(samples, seed)
        stage = STAGES[method].model_validate(
            {"stage": method, "bits": bits, "group_size": self.arguments.group_size, "balance": balance}
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            target = Path(name) / "model"
            target.mkdir()
            family = family_of(open_checkpoint(self.arguments.model).config)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            stage.apply(StageContext(self.arguments.model, target, calibration, family, device, seed, Silent()))
            return dict(self.judge.measure(target).figures)

    def _calibration(self, samples: str, seed: int) -> Path:
        folder = self.folder / f"calibration {samples} {seed}"
        if not folder.exists():
            text, questions = (
                Path(path).resolve() for path in (self.arguments.calibration_text, self.arguments.calibration_questions)
            )
            windows, count = self.arguments.samples // 4, self.arguments.samples
            sets: list[PinnedSet] = []
            if samples != "images only":
                own = TextSet(dataset="text", source=str(text), samples=windows, tokens=self.arguments.tokens)
                sets.append(PinnedSet(own, (text,)))
            if samples != "text only":
                sets.append(PinnedSet(VqaSet(dataset="vqa", source=str(questions), samples=count), (questions,)))
            collect(CalibrationSelection(seed, tuple(sets)), self.arguments.model, folder, Silent())
        return folder


def _joined(found: list[dict[str, float]]) -> dict[str, Any]:
    return {
        key: {
            "mean": statistics.mean(row[key] for row in found),
            "deviation": statistics.stdev(row[key] for row in found) if len(found) > 1 else None,
        }
        for key in found[0]
    }


def _table(rows: list[dict[str, Any]]) -> str:
    figures = [key for key in rows[0] if key not in ("method", "bits", "samples", "balance")]
    lines = [
        "| method | bits | calibrated on | balance | " + " | ".join(figures) + " |",
        "| --- " * 4 + "| ---: " * len(figures) + "|",
    ]
    for row in rows:
        values = [f"{row[key]['mean']:.2%}" if key == "accuracy" else f"{row[key]['mean']:.3g}" for key in figures]
        lines.append(f"| {row['method']} | {row['bits']} | {row['samples']} | {row['balance']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
