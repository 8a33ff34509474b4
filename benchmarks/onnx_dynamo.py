"""Vision towers as ONNX graphs: the hand-written ones beside `torch.onnx.export(dynamo=True)` of transformers' own modules.

    pip install onnxscript==0.7.2
    python -m benchmarks.onnx_dynamo --output benchmarks/results/onnx_dynamo.json

onnxscript is not in the tested set; torch's exporter imports it. It traces to two opsets: 23 has an operator for attention, 18 does
not. All graphs are float32 and of one checkpoint of random weights: the tiny one, where they are compared with transformers for
several numbers of images, and one of ViT-L's width at 336 pixels with `--blocks` blocks, where they take turns, round by round, in
ONNX Runtime with one thread. A ratio is the median over the rounds of a traced graph's seconds over the hand-written one's; below 1
the traced graph is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.onnx.graphs.layer_builder import Source
from compress.export.onnx.graphs.write import Precision, write_graphs
from compress.families.resolve import family_at
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from tests.tiny import BUILDERS

ORT: Any = onnxruntime
REFUSED = ORT.capi.onnxruntime_pybind11_state
FAMILIES = ("clip", "llava", "internvl3", "blip-2")
IMAGES = (1, 2, 3, 5)
"""How many images at once; the traced graph is traced with two."""

LARGE = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


OWN = "own"
OPSETS = {"traced": 23, "traced, opset 18": 18}


@dataclass(frozen=True)
class Tower:
    """A checkpoint's model, and its tower's graphs by how they were made."""

    model: Any
    graphs: dict[str, Path]
    seconds: dict[str, float]
    """What making each took; of the hand-written ones, those of all components."""

    faults: dict[str, str]
    """Why there is no traced graph."""


class Features(torch.nn.Module):
    """A model's image features, as a module of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Return the features of images."""
        if self.model.config.model_type != "llava":
            return image_features(self.model, pixel_values)
        # transformers cuts LLaVA's features into a list of images, which fixes their number in a trace.
        inner, layer = self.model.model, self.model.config.vision_feature_layer
        states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states[layer]
        return inner.multi_modal_projector(states[:, 1:])


def image_features(model: Any, pixels: torch.Tensor) -> Any:
    """Return what the tower and projector make of images, for each image."""
    features: Any = model.get_image_features(pixel_values=pixels).pooler_output
    return features if torch.is_tensor(features) else torch.stack(tuple(features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--blocks", type=int, default=2, help="of the large tower")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as name:
            rows[family] = measure(family, Path(name), arguments.blocks, arguments.rounds)
        print(family, json.dumps(rows[family]), file=sys.stderr)
    result = {
        "what": "vision towers in ONNX: torch's exporter beside the hand-written graphs",
        "large": {**LARGE, "blocks": arguments.blocks},
        "rounds": arguments.rounds,
        "families": rows,
        "machine": describe(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")},
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


@torch.no_grad()
def measure(family: str, folder: Path, blocks: int, rounds: int) -> dict[str, Any]:
    """Return a family's differences from transformers, operators, seconds and ratios of seconds."""
    tiny_folder = BUILDERS[family](folder / "tiny", dtype=torch.float32)
    tiny = make(tiny_folder, folder / "tiny-graphs")
    large = make(enlarged(tiny_folder, folder / "large", blocks), folder / "large-graphs")
    row: dict[str, Any] = {"export_seconds": large.seconds, "faults": tiny.faults | large.faults, "graphs": {}}
    for side, path in large.graphs.items():
        graph = onnx.load(str(path), load_external_data=False).graph
        session = opened(tiny.graphs[side])
        row["graphs"][side] = {
            "difference": {str(count): difference(tiny.model, session, count) for count in IMAGES},
            "nodes": len(graph.node),
            "operators": dict(sorted(Counter(f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in graph.node).items())),
        }
    row["seconds"] = {str(count): raced(large, count, rounds) for count in (1, 2)}
    return row


def enlarged(source: Path, target: Path, blocks: int) -> Path:
    """Write a checkpoint like `source`, with a tower of a published size."""
    configs: Any = AutoConfig
    config = configs.from_pretrained(source)
    for key, value in {**LARGE, "num_hidden_layers": blocks}.items():
        pair = isinstance(getattr(config.vision_config, key), (tuple, list))
        setattr(config.vision_config, key, [value, value] if pair else value)
    if hasattr(config, "qformer_config"):
        config.qformer_config.encoder_hidden_size = LARGE["hidden_size"]
    library: Any = AutoModel if config.model_type == "clip" else AutoModelForImageTextToText
    torch.manual_seed(0)
    library.from_config(config).save_pretrained(target)
    return target


def make(checkpoint: Path, target: Path) -> Tower:
    """Write the graphs of a checkpoint's tower."""
    target.mkdir()
    configs: Any = AutoConfig
    config = configs.from_pretrained(checkpoint)
    library: Any = AutoModel if config.model_type == "clip" else AutoModelForImageTextToText
    model = library.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    began = time.perf_counter()
    written = write_graphs(Source.of(open_checkpoint(checkpoint), family_at(checkpoint)), Precision("float32"), target, Silent())
    seconds = {OWN: time.perf_counter() - began}
    graphs = {OWN: next(path for path in written if path.stem.startswith("vision"))}
    faults: dict[str, str] = {}
    exporter: Any = torch.onnx
    for side, opset in OPSETS.items():
        path, began = target / f"traced-{opset}.onnx", time.perf_counter()
        shapes = ({0: torch.export.Dim("images", min=1, max=64)},)
        options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": opset, "verbose": False}
        try:
            exporter.export(Features(model).eval(), (pixels(model, 2),), **options).save(str(path), external_data=True)
        except exporter.OnnxExporterError as error:
            faults[side] = f"{type(error).__name__}: {str(error)[:400]}"
            continue
        graphs[side], seconds[side] = path, time.perf_counter() - began
    return Tower(model, graphs, seconds, faults)


def pixels(model: Any, count: int) -> torch.Tensor:
    """Return random images of the tower's size."""
    size = model.config.vision_config.image_size
    side = int(size if isinstance(size, int) else size[0])
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def opened(path: Path) -> Any:
    """Open a graph in ONNX Runtime with one thread."""
    options = ORT.SessionOptions()
    options.intra_op_num_threads = 1
    return ORT.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference(model: Any, session: Any, count: int) -> float | str:
    """Return the largest difference from transformers over the largest value; what ONNX Runtime says where it refuses."""
    images = pixels(model, count)
    expected = image_features(model, images).numpy()
    try:
        actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    except (REFUSED.RuntimeException, REFUSED.InvalidArgument, REFUSED.Fail) as error:
        return str(error)[:200]
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def raced(tower: Tower, count: int, rounds: int) -> dict[str, Any]:
    """Return the median seconds of each graph, taking turns, and the median ratios to the hand-written one."""
    images, sessions = pixels(tower.model, count).numpy(), {side: opened(path) for side, path in tower.graphs.items()}
    runs: dict[str, list[float]] = {side: [] for side in sessions}
    for turn in range(rounds + 1):
        for side, session in sessions.items() if turn % 2 else reversed(sessions.items()):
            began = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: images})
            runs[side].append(time.perf_counter() - began)
    timed = {side: times[1:] for side, times in runs.items()}  # the first warms up
    ratios = {
        side: statistics.median(traced / own for own, traced in zip(timed[OWN], times, strict=True))
        for side, times in timed.items()
    }
    return {"seconds": {side: statistics.median(times) for side, times in timed.items()}, "ratio": ratios}


if __name__ == "__main__":
    main()
