import json
import shutil
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import compress
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import spec_of
from compress.cli.commands.plan import print_plan
from compress.engine.derive.derived import derive_family
from compress.errors import CheckpointError
from compress.families import Family, ScalePair
from compress.families.resolve import family_at, family_of
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.stages.linears import select
from tests.families.test_loading import assert_loaded_alike
from tests.families.test_pairs import assert_pairs_hold
from tests.families.test_walk import assert_every_part_equals
from tests.jobs import content, make_job
from tests.quantized import round_checkpoint, scheme
from tests.tiny import BUILDERS, build_llava, build_qwen2_5_vl

LLAMA_LIKE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava", "llava-next", "internvl3")
PHI3 = {"model_type": "phi3", "pad_token_id": 0}  # q, k, v and gate, up are one linear each
GEMMA = {"model_type": "gemma", "pad_token_id": 0}  # its norms hold their weight's distance from one
COHERE = {"model_type": "cohere2", "pad_token_id": 0}  # attention and feed-forward read the same norm
MIXTRAL = {"model_type": "mixtral", "pad_token_id": 0, "num_local_experts": 2}
ATTENTION, FORWARD = (
    ScalePair("self_attn.v_proj", ("self_attn.o_proj",), grouped=True),
    ScalePair("mlp.up_proj", ("mlp.down_proj",)),
)

QKV_GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def derived(folder: Path) -> Family:
    return derive_family(open_checkpoint(folder), "here: unknown")


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_what_is_derived_is_what_the_record_says(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[name](tmp_path, vision_blocks=3))
    actual, record = derived(tmp_path), family_of(checkpoint.config)
    assert actual.scale_pairs == record.scale_pairs
    assert (actual.blocks, actual.embeddings, actual.head) == (record.blocks, record.embeddings, record.head)
    assert (actual.vision, actual.vision_blocks) == (record.vision, record.vision_blocks)
    assert actual.placeholders(checkpoint.config) == record.placeholders(checkpoint.config)
    assert [actual.module_name(part) for part in checkpoint.tensors] == [record.module_name(part) for part in checkpoint.tensors]


@pytest.mark.parametrize(
    ("text", "scale_pairs"),
    [
        (
            PHI3,
            (ScalePair("input_layernorm", ("self_attn.qkv_proj",)), ScalePair("post_attention_layernorm", ("mlp.gate_up_proj",))),
        ),
        (GEMMA, (ATTENTION, FORWARD)),
        (COHERE, (ScalePair("input_layernorm", QKV_GATE_UP), ATTENTION, FORWARD)),
    ],
)
def test_scales_move_only_where_it_changes_nothing(
    text: Mapping[str, Any], scale_pairs: tuple[ScalePair, ...], tmp_path: Path
) -> None:
    build_llava(tmp_path, text=text, dtype=torch.float32)
    assert family_at(tmp_path).scale_pairs == scale_pairs
    assert assert_pairs_hold(tmp_path) == set(scale_pairs)


def test_an_unknown_decoder_is_walked_loaded_and_selected(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_llava(tmp_path, text=PHI3, vision_blocks=4))
    with pytest.raises(CheckpointError, match=r"text_config\.model_type is 'phi3'; of llava only checkpoints with 'llama' or"):
        family_of(checkpoint.config)
    assert_every_part_equals(tmp_path)
    assert_loaded_alike(tmp_path)
    family = family_at(tmp_path)
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    intended = {f"model.language_model.layers.{block}.{name}" for block in range(3) for name in parts}
    assert {linear.name for linear in select(spec_of(checkpoint, family), ("decoder",), ()).linears} == intended
    projector = {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
    assert {linear.name for linear in select(spec_of(checkpoint, family), ("projector",), ()).linears} == projector


def test_what_was_derived_is_said(tmp_path: Path) -> None:
    build_llava(tmp_path, text=PHI3)
    message = family_at(tmp_path).derived
    assert message.startswith(
        "llava: no family record fits, and one was derived from the model: decoder blocks model.language_model.layers"
    )
    for name in (
        "head lm_head",
        "vision model.vision_tower, model.multi_modal_projector, its blocks model.vision_tower.encoder.layers",
        "input_layernorm → self_attn.qkv_proj; post_attention_layernorm → mlp.gate_up_proj, and not within the vision tower",
    ):
        assert name in message
    assert family_at(build_qwen2_5_vl(tmp_path / "known")).derived == ""


def test_an_unknown_decoder_goes_the_whole_way_with_a_warning(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    shutil.rmtree(job.folder / "model")
    build_llava(job.folder / "model", text=PHI3)
    export = [{"format": "vllm", "layout": "compressed-tensors"}]
    job.recipe.write_text(yaml.safe_dump(content(job) | {"export": export}), encoding="utf-8")
    output = StringIO()
    store = Store(job.store)
    print_plan(make_plan(job.recipe, {}, store), store, Console(file=output, width=1000))
    assert "warning: llava: no family record fits, and one was derived from the model" in output.getvalue()
    report = compress.run(job.recipe, **job.places())
    assert report.rows[1].size_ratio < 0.9
    assert sum(warning.startswith("llava: no family record fits") for warning in report.warnings) == 1


def test_a_quantized_checkpoint_is_of_the_family_of_its_source(tmp_path: Path) -> None:
    build_llava(tmp_path / "source", text=GEMMA)
    source = family_at(tmp_path / "source")
    round_checkpoint(tmp_path / "source", tmp_path / "rounded", scheme(4, 32))
    rounded, actual = open_checkpoint(tmp_path / "rounded"), family_at(tmp_path / "rounded")
    assert (actual.scale_pairs, actual.vision, actual.blocks) == (source.scale_pairs, source.vision, source.blocks)
    assert [actual.module_name(name) for name in rounded.tensors] == [source.module_name(name) for name in rounded.tensors]


def test_experts_are_refused(tmp_path: Path) -> None:
    build_llava(tmp_path, text=MIXTRAL)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.\w+ is a stack of matrices.*docs/adding-a-family\.md"):
        family_at(tmp_path)


def test_blocks_that_no_text_runs_through_are_refused(tmp_path: Path) -> None:
    BUILDERS["mllama"](tmp_path, layers=5)
    with pytest.raises(
        CheckpointError, match=r"here: unknown\. Nor can .* model\.language_model\.layers\.\d has no part in a text"
    ):
        derived(tmp_path)


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    BUILDERS["clip"](tmp_path)
    with pytest.raises(CheckpointError, match="its embeddings or its output head cannot be found"):
        derived(tmp_path)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"model_type": "qwen2_5_vl"', '"model_type": "nowhere"'))
    with pytest.raises(CheckpointError, match=r"model_type 'nowhere' is no supported architecture.*Nor can a family be derived"):
        family_at(tmp_path)


def test_images_whose_tokens_are_not_known_are_refused(tmp_path: Path) -> None:
    build_llava(tmp_path, text=PHI3)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"image_token_index"', '"image_token_other"'))
    with pytest.raises(CheckpointError, match=r"config\.json has none of image_token_id, image_token_index"):
        family_at(tmp_path)


def test_a_config_that_leaves_out_the_heads_is_refused(tmp_path: Path) -> None:
    build_llava(tmp_path, text=PHI3)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json leaves num_attention_heads of its text's part to transformers"):
        family_at(tmp_path)
