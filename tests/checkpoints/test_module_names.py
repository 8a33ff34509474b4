"""A quantization_config says the same of every linear to whoever reads it, by whatever names that program has for the modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import quantized_linears, unquantized_linears
from compress.checkpoints.module_names import all_names, group_of, misnamed, portable_config
from compress.checkpoints.quantization_config import quantization_config
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families import FAMILIES
from compress.families.resolve import family_of
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from tests.quantized import round_checkpoint, scheme
from tests.tiny import BUILDERS, build_qwen2_5_vl

EIGHT = Scheme(8, -1, symmetric=True, activations="token")

READERS: dict[str, tuple[tuple[str, str], ...]] = {
    "qwen2-vl": (
        ("visual.blocks.1.attn.qkv", "model.visual.blocks.1.attn.qkv"),
        ("model.layers.1.mlp.down_proj", "model.language_model.layers.1.mlp.down_proj language_model.model.layers.1.mlp.down_proj"),
        ("lm_head", "language_model.lm_head"),
    ),
    "qwen3-vl": (
        ("model.visual.blocks.1.attn.qkv", "visual.blocks.1.attn.qkv"),
        ("model.language_model.layers.1.mlp.down_proj", "language_model.model.layers.1.mlp.down_proj"),
        ("model.visual.deepstack_merger_list.0.linear_fc1", "visual.deepstack_merger_list.0.linear_fc1"),
    ),
    "llava": (
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.vision_tower.encoder.layers.0.mlp.fc1 model.vision_tower.vision_model.encoder.layers.0.mlp.fc1 "
            "vision_tower.encoder.layers.0.mlp.fc1",
        ),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.model.layers.0.mlp.down_proj", "model.language_model.layers.0.mlp.down_proj"),
        ("language_model.lm_head", "lm_head"),
    ),
    "internvl3": (("vision_tower.encoder.layer.0.mlp.fc1", "model.vision_tower.encoder.layer.0.mlp.fc1"),),
    "mllama": (
        (
            "vision_model.global_transformer.layers.0.mlp.fc1",
            "model.vision_model.global_transformer.layers.0.mlp.fc1",
        ),
        ("language_model.model.layers.1.cross_attn.q_proj", "model.language_model.layers.1.cross_attn.q_proj"),
    ),
    "blip-2": (("vision_model.encoder.layers.0.mlp.fc1", ".encoder.layers.0.mlp.fc1"),),
}  # fmt: skip
"""Of families, linears by their names on disk, each with those that other programs have: transformers 5 and 4.57, and vLLM."""

FUSED = {
    "qwen2.5-vl": ("visual.blocks.0.mlp.gate_up_proj", "language_model.model.layers.1.mlp.gate_up_proj"),
    "llava": ("vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj", "language_model.model.layers.1.mlp.gate_up_proj"),
    "clip": ("vision_model.encoder.layers.0.self_attn.qkv_proj", "text_model.encoder.layers.1.self_attn.qkv_proj"),
}
"""A layer of the tower, and one of a quantized decoder block, as vLLM has them: joined."""


def export(folder: Path, chosen: Callable[[str], Scheme | None], vision: Callable[[str], Scheme | None]) -> Checkpoint:
    """Return the artifact, in compressed-tensors' layout, of the checkpoint in `folder`/source."""
    round_checkpoint(folder / "source", folder / "rounded", chosen, vision=vision)
    (folder / "artifact").mkdir()
    family = family_of(open_checkpoint(folder / "source").config)
    layout = VllmExport.model_validate({"format": "vllm", "layout": "compressed-tensors"})
    layout.apply(ExportContext(folder / "rounded", folder / "artifact", family, Silent()))
    return open_checkpoint(folder / "artifact")


def nothing(name: str) -> Scheme | None:
    del name


def first_block_left(name: str) -> Scheme | None:
    return None if ".0." in name else scheme(4, 32, symmetric=True)


def some_of_the_tower(name: str) -> Scheme | None:
    return EIGHT if name.endswith(("fc1", "linear_fc1", "gate_proj", "up_proj")) and ".0." in name else None


def alike(family: str) -> str:
    """Return the family whose names a family has."""
    return {"qwen2.5-vl": "qwen2-vl", "llava-next": "llava"}.get(family, family)


def library_group(settings: dict[str, Any], name: str) -> str | None:
    """Return the group that compressed-tensors itself puts a linear of this name in, None for none."""
    reference: Any = QuantizationConfig.model_validate(settings)
    linear = nn.Linear(1, 1, device="meta")
    if match_targets(name, linear, reference.ignore):
        return None
    owners = {target: key for key, group in reversed(reference.config_groups.items()) for target in group.targets}
    actual = match_targets(name, linear, list(owners))
    return owners[actual[0]] if actual else None


@pytest.mark.parametrize("vision", [nothing, some_of_the_tower], ids=["one scheme", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_finds_every_linear_in_its_group(family: str, vision: Callable[[str], Scheme | None], tmp_path: Path) -> None:
    BUILDERS[family](tmp_path / "source")
    artifact = export(tmp_path, first_block_left, vision)
    record = family_of(artifact.config)
    settings, schemes = artifact.config["quantization_config"], quantized_linears(artifact)
    plain = unquantized_linears(artifact, record, schemes)
    assert len(schemes) > 2
    assert len(plain) > 4
    numbers = {scheme: f"group_{number}" for number, scheme in enumerate(dict.fromkeys(schemes.values()))}
    expected = {name: numbers[scheme] for name, scheme in schemes.items()} | dict.fromkeys(plain, None)
    for name, group in expected.items():
        others = next((forms.split() for disk, forms in READERS.get(alike(family), ()) if disk == name), list[str]())
        for form in [*all_names(record, [name]), *others]:
            assert group_of(settings, form) == library_group(settings, form) == group, form
    assert {disk for disk, _ in READERS.get(alike(family), ())} <= set(expected)
    assert misnamed(settings, record, schemes, plain) == []


@pytest.mark.parametrize("family", FUSED)
def test_layers_that_vllm_joins_are_found_by_their_new_name_too(family: str, tmp_path: Path) -> None:
    BUILDERS[family](tmp_path / "source")
    artifact = export(tmp_path, first_block_left, lambda name: EIGHT if name.endswith("out_proj") else None)
    seeing, decoding = FUSED[family]
    settings = artifact.config["quantization_config"]
    assert group_of(settings, seeing) is None
    assert group_of(settings, decoding) is not None
    assert group_of(settings, decoding.replace(".1.", ".0.")) is None


def test_joined_layers_are_named_only_where_all_their_parts_are_alike(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path / "source")
    family = family_of(open_checkpoint(tmp_path / "source").config)
    names = [f"model.layers.{block}.self_attn.{leaf}_proj" for block in (0, 1) for leaf in "qkv"]
    settings = quantization_config(dict.fromkeys(names[1:], scheme()) | {"lm_head": EIGHT}, ignore=names[:1])
    actual = portable_config(settings, family, names)
    joined = [f"language_model.model.layers.{block}.self_attn.qkv_proj" for block in (0, 1)]
    assert [group_of(actual, name) for name in joined] == [None, "group_0"]
    assert group_of(actual, "language_model.lm_head") == "group_1"


def test_a_name_on_disk_alone_is_found_to_mislead_transformers(tmp_path: Path) -> None:
    """As artifacts were written that named linears by their names on disk: blind to images where transformers loads them."""
    build_qwen2_5_vl(tmp_path / "source", layers=2)
    round_checkpoint(tmp_path / "source", tmp_path / "rounded", EIGHT)
    checkpoint = open_checkpoint(tmp_path / "rounded")
    family, schemes = family_of(checkpoint.config), quantized_linears(checkpoint)
    plain = unquantized_linears(checkpoint, family, schemes)
    settings = checkpoint.config["quantization_config"]
    assert misnamed(settings, family, schemes, plain) == [name for name in plain if name.startswith("visual.")]
    mixed = quantization_config({name: EIGHT if "mlp" in name else scheme() for name in schemes}, plain)
    assert misnamed(mixed, family, schemes, plain) == sorted(schemes)
    assert group_of(settings, "model.visual.blocks.0.attn.qkv") == "group_0"
    mended = portable_config(settings, family, [*schemes, *plain])
    assert misnamed(mended, family, schemes, plain) == []
    assert portable_config(mended, family, [*schemes, *plain]) == mended
