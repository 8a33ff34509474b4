import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.artifact import SIDE_FILES
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.engine.weights import WeightReader
from compress.errors import CheckpointError
from compress.export.format import ExportContext, Outlook
from compress.export.vllm import Vllm
from compress.export.vllm_limits import Layout
from compress.families import family_of
from compress.files import write_json
from compress.layouts import quantized_linears
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.unpack import dense_tensors
from tests.quantized import exact_weights, round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl, build_qwen2_vl



@dataclass
class Warnings(Silent):
    """Progress that keeps what it was told."""

    heard: list[str] = field(default_factory=lambda: list[str]())

    def warn(self, message: str) -> None:
        self.heard.append(message)


def export(layout: Layout, source: Path, target: Path) -> tuple[Checkpoint, list[str]]:
    """Export and return the artifact with the warnings."""
    family = family_of(open_checkpoint(source).config)
    progress = Warnings()
    target.mkdir()
    Vllm(format="vllm", layout=layout).apply(ExportContext(source, target, family, progress))
    return open_checkpoint(target), progress.heard


def dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(dense_tensors(checkpoint, torch.float32, torch.device("cpu")))


def faults(layout: Layout, checkpoint: Checkpoint, schemes: dict[str, Scheme]) -> list[str]:
    return Vllm(format="vllm", layout=layout).check(Outlook(checkpoint, family_of(checkpoint.config), schemes))


@pytest.mark.parametrize("build", [build_qwen2_5_vl, build_qwen2_vl])
@pytest.mark.parametrize("held", [scheme(4, 32), scheme(4, -1), scheme(4, 16, symmetric=True)])
def test_both_layouts_unpack_to_the_same_weights(build: type, held: Scheme, tmp_path: Path) -> None:
    source: Path = build(tmp_path / "source", layers=2)
    schemes = round_checkpoint(source, tmp_path / "rounded", held)
    awq, heard = export("awq", tmp_path / "rounded", tmp_path / "awq")
    packed, _ = export("compressed-tensors", tmp_path / "rounded", tmp_path / "packed")
    of_awq, of_packed, original = dense(awq), dense(packed), dense(open_checkpoint(source))
    exact = exact_weights(source, schemes)
    assert heard == []
    assert of_awq.keys() == of_packed.keys() == original.keys()
    for name, weight in original.items():
        expected = exact.get(name.removesuffix(".weight"), weight)
        assert torch.equal(of_awq[name], expected), name
        assert torch.equal(of_packed[name], expected), name


@pytest.mark.parametrize("held", [scheme(2, 16), scheme(3, 32), scheme(3, -1, symmetric=True), scheme(8, 64)])
def test_compressed_tensors_holds_every_width(held: Scheme, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    schemes = round_checkpoint(source, tmp_path / "rounded", held)
    unpacked = dense(export("compressed-tensors", tmp_path / "rounded", tmp_path / "packed")[0])
    for name, weight in exact_weights(source, schemes).items():
        assert torch.equal(unpacked[f"{name}.weight"], weight), name


def test_the_awq_config_has_the_names_that_vllm_expects(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", lambda name: None if name.endswith("down_proj") else scheme())
    awq, _ = export("awq", tmp_path / "rounded", tmp_path / "awq")
    settings = dict(awq.config["quantization_config"])
    left = settings.pop("modules_to_not_convert")
    expected = {"bits": 4, "group_size": 32, "lm_head": False, "quant_method": "awq", "version": "gemm", "zero_point": True}
    assert settings == expected
    assert {"visual.blocks.0.attn.qkv", "visual.merger.mlp.0", "lm_head", "model.layers.0.mlp.down_proj"} <= set(left)
    assert "model.layers.0.mlp.up_proj" not in left
    kept = {key: value for key, value in awq.config.items() if key != "quantization_config"}
    assert kept == open_checkpoint(source).config
    shapes = {name.rpartition(".")[2]: entry.shape for name, entry in awq.tensors.items() if "k_proj" in name}
    assert shapes == {"qweight": (128, 8), "qzeros": (4, 8), "scales": (4, 64), "bias": (64,)}


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_side_files_are_copied_byte_for_byte(layout: Layout, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    export(layout, tmp_path / "rounded", tmp_path / "artifact")
    names = [name for name in SIDE_FILES if (source / name).exists()]
    assert "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "artifact" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_shards_are_read_whole_and_the_size_is_predicted(layout: Layout, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source")
    schemes = round_checkpoint(source, tmp_path / "rounded", scheme(), limit=200_000)
    assert len(list((tmp_path / "rounded").glob("model-*.safetensors"))) > 3
    artifact, _ = export(layout, tmp_path / "rounded", tmp_path / "artifact")
    assert torch.equal(
        dense(artifact)["model.layers.2.mlp.down_proj.weight"], exact_weights(source, schemes)["model.layers.2.mlp.down_proj"]
    )
    runs = [Outlook(open_checkpoint(folder), family_of(artifact.config), schemes) for folder in (source, tmp_path / "rounded")]
    chosen = Vllm(format="vllm", layout=layout)
    assert [chosen.predict_bytes(outlook) for outlook in runs] == [artifact.weight_bytes] * 2


def test_the_same_checkpoint_gives_the_same_files(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    for name in ("first", "second"):
        export("awq", tmp_path / "rounded", tmp_path / name)
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_a_checkpoint_that_is_not_quantized_has_no_awq_layout(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    with pytest.raises(
        CheckpointError, match=r"no stage quantizes any; add a stage such as awq, or set layout: compressed-tensors"
    ):
        export("awq", source, tmp_path / "awq")
    assert list((tmp_path / "awq").iterdir()) == []
    plain, _ = export("compressed-tensors", source, tmp_path / "plain")
    assert plain.config == open_checkpoint(source).config
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_what_the_awq_layout_cannot_hold_is_refused_with_the_remedy(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=2))
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith("_proj.weight") and "layers" in name]
    eight = faults("awq", checkpoint, dict.fromkeys(names, scheme(8)))
    assert eight == [f"{names[0]} (and 13 more): layout awq holds 4 bits, not 8; set layout: compressed-tensors"]
    mixed = {name: scheme(4, 64 if name.endswith("layers.0.mlp.down_proj") else 32) for name in names}
    assert faults("awq", checkpoint, mixed) == [
        "model.layers.0.mlp.down_proj: layout awq holds one group size, 32 here, and not 64 as well; set layout: compressed-tensors"
    ]
    assert faults("compressed-tensors", checkpoint, mixed) == []


def test_outputs_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1, intermediate=196))
    held = {f"model.layers.0.mlp.{name}": scheme(4, 32) for name in ("gate_proj", "up_proj")}
    assert faults("awq", checkpoint, held) == [
        "model.layers.0.mlp.gate_proj (and 1 more): layout awq holds outputs by eights, not 196; set layout: compressed-tensors, "
        "or leave the layer out"
    ]
    assert faults("compressed-tensors", checkpoint, held)[0].startswith(
        "model.layers.0.mlp.gate_proj (and 1 more): 196 outputs at 4 bits do not fill 32-bit words, and vLLM cannot load"
    )
    assert faults("compressed-tensors", checkpoint, {name: scheme(4, 32, symmetric=True) for name in held}) == []


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_layers_that_vllm_joins_must_be_held_alike(layout: Layout, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1))
    held = {f"model.layers.0.self_attn.{name}": scheme() for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert faults(layout, checkpoint, held) == []
    del held["model.layers.0.self_attn.v_proj"]
    (fault,) = faults(layout, checkpoint, held)
    assert fault.startswith("model.layers.0.self_attn: vLLM joins q_proj, k_proj, v_proj into one layer")
    assert "leave all of them out" in fault


def test_scales_that_are_no_float16_numbers_are_told(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1, dtype=torch.float32)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    _, heard = export("awq", tmp_path / "rounded", tmp_path / "awq")
    assert len(heard) == 1
    assert heard[0].startswith("layout awq stores scales as float16: those of 7 linears (model.layers.0.mlp.down_proj first)")


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1, spread=4e5)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj: has scales up to .* set layout: compressed-tensors"):
        export("awq", tmp_path / "rounded", tmp_path / "awq")
    assert not list((tmp_path / "awq").glob("*.safetensors"))


def test_a_config_that_would_have_vllm_quantize_a_plain_linear_is_refused(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    path = tmp_path / "rounded" / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["ignore"].remove("visual.merger.mlp.0")
    write_json(path, content)
    with pytest.raises(CheckpointError, match=r"ignore leaves out visual\.merger\.mlp\.0, which are not quantized"):
        export("compressed-tensors", tmp_path / "rounded", tmp_path / "packed")


def test_damage_between_stages_is_found(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    checkpoint = open_checkpoint(tmp_path / "rounded")
    entry = checkpoint.tensors["model.layers.0.mlp.up_proj.weight_scale"]
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff\xff")
    reader = WeightReader(checkpoint, family_of(checkpoint.config))
    assert quantized_linears(checkpoint)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale holds NaN"):
        reader.disk_tensor("model.layers.0.mlp.up_proj.weight_scale")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale holds NaN"):
        export("awq", tmp_path / "rounded", tmp_path / "awq")
