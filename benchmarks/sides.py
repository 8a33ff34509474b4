"""What the benchmarks beside llm-compressor share: the same samples for both sides, each method in a process of its own.

Run as a program, it is this package's side, as peer.py is the other's: one stage on one model, timed.

    python -m benchmarks.sides --stage '{"stage": "gptq", "bits": 4, "group_size": 64}' --model M --calibration C --output O
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compress.stages.quantization.quantize
from compress.calibration.batches import load_batches
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import open_checkpoint
from compress.families.resolve import family_of
from compress.progress import Silent
from compress.recipe.schema import load_row
from compress.stages import STAGES
from compress.stages.stage import Stage, StageContext

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "compressed-tensors", "llmcompressor", "auto-round")
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Samples:
    """Calibration samples as both sides take them: a folder of ours, and plain forward arguments for the other."""

    folder: Path
    batches: Path
    tokens: Mapping[str, int]


def take_samples(model: Path, text: Path, questions: Path | None, count: int, tokens: int, folder: Path, seed: int = 0) -> Samples:
    """Draw `count` windows of text and, where there are any, as many questions, and save them for all sides."""
    source = text.resolve()
    sets = [PinnedSet(TextSet(dataset="text", source=str(source), samples=count, tokens=tokens), (source,))]
    if questions is not None:
        source = questions.resolve()
        sets.append(PinnedSet(VqaSet(dataset="vqa", source=str(source), samples=count), (source,)))
    collect(CalibrationSelection(seed, tuple(sets)), model, folder / "calibration", Silent())
    batches = [batch.inputs() for batch in load_batches(folder / "calibration", model, TOKENS_PER_BATCH)]
    if any(not batch["attention_mask"].all() for batch in batches):  # the other side counts padding, so it gets none
        singles = [batch.inputs() for batch in load_batches(folder / "calibration", model, 1)]
        batches = [batch for batch in batches if "pixel_values" not in batch]
        batches += [batch for batch in singles if "pixel_values" in batch]
    torch.save(batches, folder / "batches.pt")
    counts = {"text": 0, "with_image": 0}
    for batch in batches:
        counts["with_image" if "pixel_values" in batch else "text"] += int(batch["attention_mask"].sum())
    return Samples(folder / "calibration", folder / "batches.pt", counts)


def stage_of(fields: Mapping[str, Any]) -> Stage:
    """Return a stage by its recipe's fields."""
    stage = load_row(STAGES, str(fields["stage"])).model_validate(fields)
    assert isinstance(stage, Stage)
    return stage


def run_ours(fields: Mapping[str, Any], model: Path, samples: Samples, output: Path, threads: int) -> dict[str, float]:
    """Apply a stage in a fresh process; return its seconds and peaks."""
    command = [sys.executable, "-m", "benchmarks.sides", "--stage", json.dumps(fields), "--model", str(model.resolve())]
    return _run(
        [*command, "--calibration", str(samples.folder), "--output", str(output), "--threads", str(threads)], output, threads
    )


def run_peer(python: Path, options: Sequence[str], model: Path, samples: Samples, output: Path, threads: int) -> dict[str, float]:
    """Apply one of llm-compressor's methods in a fresh process; return its seconds and peaks."""
    return _run_script("peer.py", python, options, model, samples, output, threads)


def run_autoround(
    python: Path, options: Sequence[str], model: Path, samples: Samples, output: Path, threads: int
) -> dict[str, float]:
    """Apply AutoRound in a fresh process; return its seconds and peaks."""
    return _run_script("autoround_peer.py", python, options, model, samples, output, threads)


def _run_script(
    script: str, python: Path, options: Sequence[str], model: Path, samples: Samples, output: Path, threads: int
) -> dict[str, float]:
    command = [str(python), str(ROOT / "benchmarks" / script), *options, "--model", str(model.resolve())]
    found = _run([*command, "--batches", str(samples.batches), "--output", str(output), "--threads", str(threads)], output, threads)
    copy_side_files(model, output)
    return found


def _run(command: list[str], output: Path, threads: int) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | limits, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions(peer: Path | None, name: str = "llm-compressor") -> dict[str, dict[str, str]]:
    """Return the versions on both sides."""
    code = (
        "import importlib.metadata as m, json; "
        f"print(json.dumps({{n: m.version(n) for n in {PACKAGES!r} if n in {{d.name for d in m.distributions()}}}}))"
    )
    here = {row.name for row in importlib.metadata.distributions()}
    found = {"compress": {name: importlib.metadata.version(name) for name in PACKAGES if name in here}}
    found["compress"]["python"] = sys.version.split()[0]
    if peer is not None:
        done = subprocess.run([str(peer), "-c", code], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=json.loads, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cuda = torch.cuda.is_available()
    assert compress.stages.quantization.quantize  # imported before the clock starts, as on the other side
    stage, imported = stage_of(arguments.stage), _resident()
    start, before = time.perf_counter(), time.process_time()
    family = family_of(open_checkpoint(arguments.model).config)
    device = "cuda" if cuda else "cpu"
    stage.apply(StageContext(arguments.model, arguments.output, arguments.calibration, family, device, 0, Silent()))
    result = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - before,
        "peak_host_bytes": _resident(),
        "imported_host_bytes": imported,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }
    print(json.dumps(result))


def _resident() -> int:
    """Return the largest resident size of this process so far, in bytes; that of getrusage counts the parent's at the start."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
