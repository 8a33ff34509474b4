"""LLaVA's and LLaVA-NeXT's graphs beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipVisionConfig
from transformers.models.llava_next import modeling_llava_next

from compress.errors import CheckpointError
from compress.export.onnx.graphs.graph import Graph
from compress.export.onnx.graphs.llava_next import image_layout, token_rows
from tests.export.onnx_graphs import written
from tests.export.onnx_seeing import MARKS, PROMPTS, Seeing, difference, rebuilt, seeing
from tests.tiny import BUILDERS

LLAVA_NEXT = cast("Any", modeling_llava_next)
FAMILIES = ("llava", "llava-next")
GRIDS = (
    (336, 14, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
    (384, 16, [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]),
)
"""The side of a tile, that of a patch and the sizes that an image may be scaled to: of LLaVA-NeXT, and as many as others have."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("side", "patch", "resolutions"), GRIDS, ids=["published", "many"])
def test_tiles_are_packed_as_by_transformers(
    side: int, patch: int, resolutions: list[list[int]], seed: int, tmp_path: Path
) -> None:
    config: Any = SimpleNamespace(
        image_grid_pinpoints=resolutions, vision_config=SimpleNamespace(image_size=side, patch_size=patch)
    )
    grid, generator = side // patch, np.random.default_rng(seed)
    graph = Graph("packing")
    layout = image_layout(graph, graph.input("image_sizes", np.int64, ["images", 2]), config, grid)
    graph.output("tiles", layout.tiles, np.int64, ["images"])
    graph.output("places", token_rows(graph, layout, grid), np.int64, ["tokens"])
    session: Any = onnxruntime.InferenceSession(str(graph.save(tmp_path, {})))
    for _ in range(60):
        sizes = _sizes(generator, resolutions)
        tiles: list[int] = [LLAVA_NEXT.image_size_to_num_patches(size, resolutions, side) for size in sizes]
        numbered = torch.arange(float(sum(tiles) * grid**2)).view(-1, grid**2, 1)
        packed = _packed(config, list(cast("Any", numbered).split(tiles)), sizes)
        counted, places = session.run(None, {"image_sizes": np.array(sizes, np.int64)})
        assert counted.tolist() == tiles, sizes
        assert places.tolist() == packed, sizes


def _packed(config: Any, features: list[torch.Tensor], sizes: list[list[int]]) -> list[float]:
    """Return transformers' order of numbered features, -1 for a newline."""
    pack, newline = LLAVA_NEXT.LlavaNextModel.pack_image_features, torch.tensor([-1.0])
    found: list[torch.Tensor] = pack(SimpleNamespace(config=config), features, torch.tensor(sizes), "default", newline)[0]
    return cast("Any", torch.cat(found)).flatten().tolist()


def _sizes(generator: np.random.Generator, resolutions: list[list[int]]) -> list[list[int]]:
    """Return heights and widths of up to three images: of any shape, or with the very sides of a resolution."""
    sizes: list[list[int]] = []
    for _ in range(generator.integers(1, 4)):
        if generator.random() < 0.4:
            height, width = resolutions[generator.integers(len(resolutions))]
            up, down = generator.integers(1, 8), generator.integers(1, 6)
            sizes.append([int(max(1, extent * up // down)) for extent in (height, width)])
        else:
            height = int(generator.integers(1, (60, 700, 5000)[generator.integers(3)]))
            sizes.append([height, int(generator.integers(max(1, height // 30), height * 30))])
    return sizes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llava", {"vision_feature_layer": -1}),
        ("llava", {"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "full"}),
        ("llava-next", {"vision_feature_layer": [2, 0]}),
        ("llava", {"siglip": True, "vision_feature_select_strategy": "full", "projector_hidden_act": "relu"}),
        ("llava-next", {"siglip": True, "vision_feature_select_strategy": "full", "multimodal_projector_bias": False}),
    ],
    ids=["last", "several", "first", "siglip", "siglip tiles"],
)
def test_other_towers_and_layers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = BUILDERS[family](tmp_path / "source")
    config = cast("Any", AutoConfig).from_pretrained(source)
    if changes.pop("siglip", False):
        config.vision_config = SiglipVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
        )
    for key, value in changes.items():
        setattr(config, key, value)
    folder = rebuilt(source, tmp_path / "model", config)
    model = seeing(folder, tmp_path / "onnx", MARKS["llava"])
    pixels = model.pixels([(200, 90), (57, 300)])
    assert difference(model.features(pixels), model.expected_features(pixels)) < 2e-5


@pytest.mark.parametrize("window", [8, 25])
def test_a_sliding_window_is_transformers_own(window: int, tmp_path: Path) -> None:
    folder = BUILDERS["llava-next"](tmp_path / "model")
    _change(folder, window, "text_config", "sliding_window")
    model = seeing(folder, tmp_path / "onnx", MARKS["llava"])
    assert difference(model.expected_logits(*PROMPTS[0])[:window], _unlimited(folder, model)[:window]) < 3e-5
    assert difference(model.expected_logits(*PROMPTS[0]), _unlimited(folder, model)) > 0.1
    rows = [model.row(*prompt) for prompt in PROMPTS]
    for prompt, actual in zip(PROMPTS, model.graphs.logits(rows, steps=2), strict=True):
        assert difference(actual, model.expected_logits(*prompt)) < 3e-5


def _unlimited(folder: Path, model: Seeing) -> Any:
    """Return transformers' logits of the first prompt where every token sees all before it."""
    _change(folder, None, "text_config", "sliding_window")
    other = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return other(**model.inputs(*PROMPTS[0])).logits[0].numpy()


@pytest.mark.parametrize(
    ("family", "key", "value", "fault"),
    [
        ("llava", "vision_feature_layer", -4, "vision_feature_layer is -4, of a tower of 2 blocks"),
        ("llava-next", "vision_feature_layer", [-2, 3], r"vision_feature_layer is \[-2, 3\], of a tower of 2 blocks"),
        ("llava-next", "vision_feature_select_strategy", "full", "'full' leaves 17 tokens of the 16 patches of a tile"),
    ],
)
def test_what_a_tower_cannot_give_is_told(family: str, key: str, value: Any, fault: str, tmp_path: Path) -> None:
    folder = BUILDERS[family](tmp_path / "model")
    _change(folder, value, key)
    with pytest.raises(CheckpointError, match=f"{folder}/config.json: .*{fault}"):
        written(folder, tmp_path / "onnx")


def _change(folder: Path, value: Any, *path: str) -> None:
    """Set a key of a checkpoint's config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    owner = config
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
