"""CLIP at the edge: INT8 encoders in ONNX Runtime beside the same model in PyTorch, on one core: size, time, zero-shot accuracy.

    python -m benchmarks.clip_edge --output benchmarks/results/clip_edge.json

The demo's CLIP is quantized (W8A8, both towers and projections), exported in float32 and in INT8, and asked which of its classes
each held-out image is of. Every side has one thread and takes one image, or one text, at a time. The sides take turns; a round is
`--calls` calls of each, and a row has the median over the rounds of a call's time on the core (`process_time`, which a busy machine
lengthens little) and by the clock. `speedup` is the median of PyTorch's time over a side's in the same round. Preparing images and
texts is left out: all sides take the same arrays.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import CLIPModel, CLIPProcessor

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import VqaSet
from compress.checkpoints.checkpoint import open_checkpoint
from compress.data.prompts import decode_image
from compress.data.sources import Columns, QuestionSource
from compress.eval.tasks.task import draw_questions
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.stages.quantization.int8 import Int8
from compress.stages.stage import StageContext

DEMO = Path("recipes/demo/clip")
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")
COLUMNS = ("label", "caption")
TEMPLATES = ("{}", "a picture of {}")
PYTORCH, FLOAT = "PyTorch float32", "ONNX float32"
_ORT: Any = onnxruntime

Images = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Texts = Callable[[Mapping[str, NDArray[np.int64]]], NDArray[np.float32]]


@dataclass(frozen=True)
class Side:
    """A pair of encoders: what makes an embedding of an image, and of a text, and their bytes on disk."""

    images: Images
    texts: Texts
    bytes: int


@dataclass(frozen=True)
class Question:
    """A class for each of the held-out images, and the classes' texts, tokenized."""

    classes: NDArray[np.int64]
    texts: list[dict[str, NDArray[np.int64]]]


@dataclass(frozen=True)
class Held:
    """Held-out images [n, 3, size, size], and what is asked of them: classes without a number of shapes, and with one."""

    pixels: NDArray[np.float32]
    questions: dict[str, Question]


def main() -> None:
    """Measure all sides, write the figures and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        sides = build_sides(given.model, Path(folder))
    held = read_images(given.model)
    rows: dict[str, dict[str, Any]] = {name: {"bytes": side.bytes, **accuracies(side, held)} for name, side in sides.items()}
    for part in ("image", "text"):
        for name, figures in measure(sides, held, part, given.rounds, given.calls).items():
            rows[name][part] = figures
    for row in rows.values():
        row["times_smaller"] = round(rows[FLOAT]["bytes"] / row["bytes"], 3)
        for name in held.questions:
            row[name]["points_lost"] = round(100 * (rows[PYTORCH][name]["right"] - row[name]["right"]), 2)
    report = {
        "rows": rows,
        "images": len(held.pixels),
        "classes": {name: len(question.texts) // len(TEMPLATES) for name, question in held.questions.items()},
        "threads": 1,
        "rounds": given.rounds,
        "calls": given.calls,
        "load_average": [round(each, 1) for each in (*before, *os.getloadavg())],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": describe(),
    }
    write_json(given.output, report)
    print(table(rows))


def build_sides(model: Path, folder: Path) -> dict[str, Side]:
    """Return PyTorch's float32 model and the ONNX encoders that are made of the same checkpoint."""
    original = model / "model"
    calibration, source = folder / "calibration", (model / "calibration.parquet").resolve()
    samples = VqaSet(dataset="vqa", source=str(source), samples=128, columns=Columns(question="caption"))
    collect(CalibrationSelection(0, (PinnedSet(samples, (source,)),)), original, calibration, Silent())
    sides = {PYTORCH: _pytorch(original), FLOAT: _onnx(original, folder / "float32")}
    for activations in ("tensor", "token"):
        target = folder / activations
        target.mkdir()
        stage = Int8.model_validate({"stage": "int8", "activations": activations, "targets": ["decoder", "vision", "projector"]})
        stage.apply(StageContext(original, target, calibration, _family(original), "cpu", 0, Silent()))
        sides[f"ONNX INT8, a scale per {activations}"] = _onnx(target, folder / f"{activations}-onnx", embedding_bits=8)
    return sides


def _family(folder: Path) -> Any:
    return family_of(open_checkpoint(folder).config)


def _pytorch(folder: Path) -> Side:
    model: Any = cast("Any", CLIPModel).from_pretrained(folder, dtype=torch.float32).eval()

    def images(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output.numpy()

    def texts(given: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        return model.get_text_features(**{name: torch.from_numpy(ids) for name, ids in given.items()}).pooler_output.numpy()

    return Side(images, texts, 4 * sum(weight.numel() for weight in model.parameters()))


def _onnx(source: Path, target: Path, embedding_bits: int | None = None) -> Side:
    export = Onnx.model_validate({"format": "onnx", "dtype": "float32", "embedding_bits": embedding_bits})
    target.mkdir()
    export.apply(ExportContext(source, target, _family(source), Silent()))
    options: Any = _ORT.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions: list[Any] = [
        _ORT.InferenceSession(str(target / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("vision_model", "text_model")
    ]

    def images(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return sessions[0].run(None, {"pixel_values": pixels})[0]

    def texts(given: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        return sessions[1].run(None, dict(given))[0]

    return Side(images, texts, sum(path.stat().st_size for path in target.glob("*.onnx*")))


def read_images(model: Path) -> Held:
    """Return the held-out images of the demo; their labels and captions are the classes."""
    processor: Any = cast("Any", CLIPProcessor).from_pretrained(model / "model")
    questions: dict[str, Question] = {}
    found: list[Any] = []
    for column in COLUMNS:
        source, columns = model / "test.parquet", Columns(question=None, answer=column)
        found = draw_questions([source], QuestionSource.model_construct(source=str(source), columns=columns), None, 0)
        given = [each.answers[0] for each in found]
        names = sorted(set(given))
        texts = [dict(processor.tokenizer([words.format(name)], return_tensors="np")) for name in names for words in TEMPLATES]
        questions[column] = Question(np.array([names.index(name) for name in given]), texts)
    images = [decode_image(each.images[0], each.id) for each in found]
    return Held(processor.image_processor(images, return_tensors="np")["pixel_values"], questions)


def accuracies(side: Side, held: Held) -> dict[str, dict[str, float]]:
    """Return the share of images whose class's mean direction is the nearest, of each kind of classes."""
    images = np.concatenate([_unit(side.images(held.pixels[place : place + 1])) for place in range(len(held.pixels))])
    found: dict[str, dict[str, float]] = {}
    for name, question in held.questions.items():
        texts = np.concatenate([_unit(side.texts(text)) for text in question.texts])
        classes = _unit(texts.reshape(-1, len(TEMPLATES), texts.shape[1]).mean(axis=1))
        found[name] = {"right": float(((images @ classes.T).argmax(axis=1) == question.classes).mean())}
    return found


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def measure(sides: Mapping[str, Side], held: Held, part: str, rounds: int, calls: int) -> dict[str, dict[str, Any]]:
    """Return milliseconds per image or text of each side; a first round warms up."""
    image, text = held.pixels[:1], held.questions["label"].texts[0]
    asked: dict[str, Callable[[], object]] = {
        name: (lambda side=side: side.images(image)) if part == "image" else (lambda side=side: side.texts(text))
        for name, side in sides.items()
    }
    core: dict[str, list[float]] = {name: [] for name in sides}
    clock: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(asked) if number % 2 else list(asked)[::-1]:
            asked[name]()
            started, spent = time.perf_counter(), time.process_time()
            for _ in range(calls):
                asked[name]()
            if number:
                core[name].append(1000 * (time.process_time() - spent) / calls)
                clock[name].append(1000 * (time.perf_counter() - started) / calls)
    return {
        name: {
            "core_ms": round(statistics.median(core[name]), 3),
            "clock_ms": round(statistics.median(clock[name]), 3),
            "least_clock_ms": round(min(clock[name]), 3),
            "speedup": round(_median_ratio(core[PYTORCH], core[name]), 2),
            "speedup_over_onnx_float32": round(_median_ratio(core[FLOAT], core[name]), 2),
        }
        for name in sides
    }


def _median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures as a table; the shares are of images put right among all labels, and among all captions."""
    heads = ("MB", "smaller", "ms/image", "faster", "ms/text", "faster", "labels", "lost", "captions", "lost")
    lines = [f"{'':29}" + "".join(f"{head:>9}" for head in heads)]
    for name, row in rows.items():
        figures = [f"{row['bytes'] / 1e6:.2f}", f"{row['times_smaller']:.2f}"]
        for part in ("image", "text"):
            figures += [f"{row[part]['core_ms']:.3f}", f"{row[part]['speedup']:.2f}"]
        for column in COLUMNS:
            figures += [f"{row[column]['right']:.2%}", f"{row[column]['points_lost']:.2f}"]
        lines.append(f"{name:29}" + "".join(f"{figure:>9}" for figure in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
