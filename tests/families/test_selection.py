import re
from pathlib import Path

import pytest
from torch import nn

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.output_head import head_is_tied
from compress.checkpoints.spec import spec_of
from compress.families.resolve import family_of
from compress.stages.linears import Target, select
from tests.families.samples import load_plain
from tests.tiny import BUILDERS

TARGETS: tuple[Target, ...] = ("decoder", "vision", "projector", "lm_head")
_LLAMA = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_CLIP = r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
_LLAVA = (_LLAMA, rf"model\.vision_tower\.{_CLIP}", r"model\.multi_modal_projector\.linear_[12]", "lm_head")
INTENDED: dict[str, tuple[str, str, str, str]] = {
    "qwen2-vl": (
        _LLAMA,
        r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
        r"model\.visual\.merger\.mlp\.[02]",
        "lm_head",
    ),
    "qwen2.5-vl": (
        _LLAMA,
        r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        r"model\.visual\.merger\.mlp\.[02]",
        "lm_head",
    ),
    "qwen3-vl": (
        _LLAMA,
        r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
        "lm_head",
    ),
    "llava": _LLAVA,
    "llava-next": _LLAVA,
    "internvl3": (
        _LLAMA,
        r"model\.vision_tower\.encoder\.layer\.\d+\.(attention\.([qkv]_proj|projection_layer)|mlp\.fc[12])",
        r"model\.multi_modal_projector\.linear_[12]",
        "lm_head",
    ),
    "mllama": (
        r"model\.language_model\.layers\.\d+\.((self|cross)_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        r"model\.vision_model\.(global_)?transformer\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.fc[12])",
        r"model\.multi_modal_projector",
        "lm_head",
    ),
    "blip-2": (
        r"language_model\.model\.decoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc[12])",
        r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(qkv|projection)|mlp\.fc[12])",
        r"language_projection|qformer\.encoder\.layer\.\d+\..*(query|key|value|dense)",
        r"language_model\.lm_head",
    ),
    "clip": (rf"text_model\.{_CLIP}", rf"vision_model\.{_CLIP}", r"(visual|text)_projection", ""),
}
"""The linears of each component, by their names in transformers' model."""


@pytest.mark.parametrize("name", BUILDERS)
def test_each_component_has_exactly_its_own_linears(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[name](tmp_path, vision_blocks=3))
    family = family_of(checkpoint.config)
    linears = {part: module for part, module in load_plain(tmp_path).named_modules() if isinstance(module, nn.Linear)}
    for target, pattern in zip(TARGETS, INTENDED[name], strict=True):
        written = "" if target == "lm_head" and head_is_tied(checkpoint, family) else pattern
        intended = {part: (each.out_features, each.in_features) for part, each in linears.items() if re.fullmatch(written, part)}
        selection = select(spec_of(checkpoint, family), (target,), ())
        assert {linear.name: (linear.rows, linear.columns) for linear in selection.linears} == intended, target
        assert bool(selection.faults) != bool(intended)
        assert all(f"{linear.disk_name}.weight" in checkpoint.tensors for linear in selection.linears)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_linear_belongs_to_one_component(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[name](tmp_path))
    family = family_of(checkpoint.config)
    actual = [select(spec_of(checkpoint, family), (target,), ()).linears for target in TARGETS]
    names = [linear.name for linears in actual for linear in linears]
    linears = [linear_name for linear_name, module in load_plain(tmp_path).named_modules() if isinstance(module, nn.Linear)]
    if head_is_tied(checkpoint, family):
        linears.remove(str(family.head))
    assert sorted(names) == sorted(linears)
