"""Predicted beside measured loss: one layer at a time is rounded, and the model's predictions are compared with the original's.

    python -m benchmarks.sensitivity --model recipes/demo/model \
        --calibration-text recipes/demo/calibration.txt --calibration-questions recipes/demo/calibration.parquet \
        --test-text recipes/demo/test.txt --test-questions recipes/demo/test.parquet --output benchmarks/results/sensitivity.json

The prediction is `compress.engine.sensitivity`'s, from the calibration samples: nats per text token. It is measured as the
mean of KL(original ‖ changed) over the text tokens of the test samples, which it has not seen, and of the calibration samples; both
models run in float32. Layers are rounded to the nearest code of asymmetric grids.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from compress.calibration.batches import Batch, load_batches
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import spec_of
from compress.engine.replay import Replay, WalkConfig
from compress.engine.sensitivity import measure_sensitivity
from compress.engine.statistics import observe
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.stages.linears import select

TOKENS_PER_BATCH = 4096


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        rows = _compare(arguments, Path(name))
    result = {
        "what": "loss predicted from output sensitivities beside measured KL, one layer rounded at a time",
        "model": arguments.model.name,
        "group_size": arguments.group_size,
        "samples": arguments.samples,
        "summary": {str(width): _summary([row for row in rows if row["width"] == width]) for width in arguments.widths}
        | {"all": _summary(rows)},
        "layers": rows,
        "machine": describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("vlm-compress", "torch", "transformers", "scipy")},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "layers"}, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    for kind in ("calibration", "test"):
        parser.add_argument(f"--{kind}-text", type=Path, required=True)
        parser.add_argument(f"--{kind}-questions", type=Path, help="JSONL or parquet; none for text alone")
    parser.add_argument("--samples", type=int, default=48, help="of questions; a quarter as many windows of text")
    parser.add_argument("--tokens", type=int, default=256, help="per window of text")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _samples(arguments: argparse.Namespace, kind: str, folder: Path) -> Sequence[Batch]:
    text = getattr(arguments, f"{kind}_text").resolve()
    own = TextSet(dataset="text", source=str(text), samples=arguments.samples // 4, tokens=arguments.tokens)
    sets = [PinnedSet(own, (text,))]
    if getattr(arguments, f"{kind}_questions"):
        questions = getattr(arguments, f"{kind}_questions").resolve()
        sets.append(PinnedSet(VqaSet(dataset="vqa", source=str(questions), samples=arguments.samples), (questions,)))
    collect(CalibrationSelection(0, tuple(sets)), arguments.model, folder / kind, Silent())
    return load_batches(folder / kind, arguments.model, TOKENS_PER_BATCH)


def _compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    given, test = (_samples(arguments, kind, folder) for kind in ("calibration", "test"))
    checkpoint = open_checkpoint(arguments.model)
    family = family_of(checkpoint.config)
    linears = [linear.name for linear in select(spec_of(checkpoint, family), ("decoder",), ()).linears]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = WalkConfig(checkpoint, family, given, device, folder)
    sensitivities = measure_sensitivity(plan, linears, seed=0)
    measuring = {"kl_calibration": _Kl(arguments.model, given, device), "kl_test": _Kl(arguments.model, test, device)}
    replay = Replay(plan)
    rows: list[dict[str, Any]] = []
    for visit in replay.walk(replay.decoder_units()):
        local = [name.removeprefix(f"{visit.name}.") for name in linears if name.startswith(f"{visit.name}.")]
        moments = observe(visit, local)
        for name, width in ((name, width) for name in local for width in arguments.widths):
            weight = visit.module.get_parameter(f"{name}.weight").detach()
            rounded = quantize(weight, Scheme(width, arguments.group_size, symmetric=False), weight.dtype).dequantize()
            full = f"{visit.name}.{name}"
            predicted = sensitivities[full].predicted_loss(rounded - weight.float(), moments[name])
            measured = {kind: measure.changed(full, rounded) for kind, measure in measuring.items()}
            rows.append({"layer": full, "width": width, "predicted": predicted, **measured})
            print(full, width, f"{predicted:.3g}", *(f"{value:.3g}" for value in measured.values()), file=sys.stderr)
    return rows


class _Kl:
    """Measures how far a model's predictions of text tokens move when one weight changes."""

    @torch.no_grad()
    def __init__(self, folder: Path, batches: Sequence[Batch], device: str) -> None:
        self.model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.device = device
        self.batches = batches
        self.expected = [self._predict(batch) for batch in batches]

    @torch.no_grad()
    def changed(self, name: str, weight: Tensor) -> float:
        """Return the mean KL in nats per text token with another weight in the place of a linear's own."""
        linear = self.model.get_submodule(name)
        own = linear.weight.data
        linear.weight.data = weight.to(own)
        total = torch.zeros((), dtype=torch.float64)
        for batch, expected in zip(self.batches, self.expected, strict=True):
            total += (expected.exp() * (expected - self._predict(batch))).sum(dtype=torch.float64).cpu()
        linear.weight.data = own
        return float(total) / sum(map(len, self.expected))

    def _predict(self, batch: Batch) -> Tensor:
        inputs = {name: value.to(self.device) for name, value in batch.inputs().items()}
        config = self.model.config
        text = inputs["attention_mask"].bool() & (inputs["input_ids"] != config.image_token_id)
        return self.model(**inputs, use_cache=False).logits[text].float().log_softmax(-1)


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary: dict[str, dict[str, float]] = {}
    predicted = np.array([row["predicted"] for row in rows])
    for kind in ("kl_calibration", "kl_test"):
        measured = np.array([row[kind] for row in rows])
        ratios = predicted / measured
        summary[kind] = {
            "rank_correlation": float(cast("Any", scipy.stats).spearmanr(predicted, measured).statistic),
            "ratio_of_sums": float(predicted.sum() / measured.sum()),
            "ratio_median": float(np.median(ratios)),
            "ratio_smallest": float(ratios.min()),
            "ratio_largest": float(ratios.max()),
        }
    return summary


if __name__ == "__main__":
    main()
