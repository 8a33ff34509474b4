import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.checkpoints.artifact import side_files
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.module_names import all_names, group_of
from compress.engine.weights import WeightReader
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.export.vllm.limits import Layout
from compress.families.resolve import family_of
from compress.files import write_json
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.unpack import dense_tensors
from tests.quantized import exact_weights, round_checkpoint, scheme
from tests.specs import planned
from tests.tiny import BUILDERS, build_blip2, build_qwen2_5_vl, build_qwen2_vl


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
    VllmExport(format="vllm", layout=layout).apply(ExportContext(source, target, family, progress))
    return open_checkpoint(target), progress.heard


def dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(dense_tensors(checkpoint, torch.float32, torch.device("cpu")))


EIGHT_BITS = [
    Scheme(8, -1, symmetric=True, activations="token"),
    Scheme(8, -1, symmetric=True, activations="tensor"),
    Scheme(8, -1, symmetric=True, type="float", activations="token"),
    Scheme(8, -1, symmetric=True, type="float", block_rows=-1, activations="tensor"),
    Scheme(8, 128, symmetric=True, type="float", block_rows=128, activations="group"),
]


def faults(layout: Layout, checkpoint: Checkpoint, schemes: dict[str, Scheme]) -> list[str]:
    return VllmExport(format="vllm", layout=layout).check(planned(checkpoint, family_of(checkpoint.config), schemes))


@pytest.mark.parametrize("build", [build_qwen2_5_vl, build_qwen2_vl])
@pytest.mark.parametrize("rounding", [scheme(4, 32), scheme(4, -1), scheme(4, 16, symmetric=True)])
def test_both_layouts_unpack_to_the_same_weights(build: type, rounding: Scheme, tmp_path: Path) -> None:
    source: Path = build(tmp_path / "source", layers=2)
    schemes = round_checkpoint(source, tmp_path / "rounded", rounding)
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


@pytest.mark.parametrize("rounding", [scheme(4, 32, True), scheme(4, -1, True), scheme(8, 64, True), scheme(8, -1, True)])
def test_gptq_unpacks_to_the_same_weights(rounding: Scheme, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    schemes = round_checkpoint(source, tmp_path / "rounded", rounding)
    artifact, heard = export("gptq", tmp_path / "rounded", tmp_path / "gptq")
    unpacked, exact = dense(artifact), exact_weights(source, schemes)
    assert heard == []
    for name, weight in dense(open_checkpoint(source)).items():
        assert torch.equal(unpacked[name], exact.get(name.removesuffix(".weight"), weight)), name


def test_the_gptq_config_names_what_is_quantized(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    schemes = round_checkpoint(source, tmp_path / "rounded", scheme(4, 64, symmetric=True))
    artifact, _ = export("gptq", tmp_path / "rounded", tmp_path / "gptq")
    assert artifact.config["quantization_config"] == {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 64, "lm_head": False, "quant_method": "gptq",
        "modules_in_block_to_quantize": all_names(family_of(artifact.config), sorted(schemes)), "sym": True,
    }  # fmt: skip
    tensors = {name.rpartition(".")[2]: entry for name, entry in artifact.tensors.items() if "k_proj" in name}
    shapes = {part: entry.shape for part, entry in tensors.items()}
    assert shapes == {"qweight": (16, 64), "qzeros": (2, 8), "scales": (2, 64), "g_idx": (128,), "bias": (64,)}
    assert tensors["scales"].dtype == "F16"
    reader = WeightReader(artifact, family_of(artifact.config))
    name = "model.layers.0.self_attn.k_proj"
    zero_points = reader.disk_tensor(f"{name}.qzeros")
    assert torch.equal(zero_points, torch.full_like(zero_points, 0x77777777))
    assert torch.equal(reader.disk_tensor(f"{name}.g_idx"), torch.arange(128, dtype=torch.int32) // 64)


@pytest.mark.parametrize("rounding", [*EIGHT_BITS, None])
def test_compressed_tensors_holds_8_bits_and_mixtures(rounding: Scheme | None, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=2, kv_heads=4, vision_hidden=128)
    choices = {"self_attn": EIGHT_BITS[0], "mlp": scheme(3, 64)}

    def choose(name: str) -> Scheme | None:
        return rounding or choices[name.split(".")[3]]

    schemes = round_checkpoint(source, tmp_path / "rounded", choose, vision=lambda name: EIGHT_BITS[2])
    artifact, _ = export("compressed-tensors", tmp_path / "rounded", tmp_path / "artifact")
    assert quantized_linears(artifact) == schemes
    assert artifact.config["quantization_config"]["format"] == (
        "float-quantized" if rounding is not None and rounding.type == "float" else "mixed-precision"
    )
    unpacked, exact = dense(artifact), exact_weights(source, schemes)
    assert unpacked.keys() == open_checkpoint(source).tensors.keys()
    for name, weight in exact.items():
        assert torch.equal(unpacked[f"{name}.weight"], weight), name
    specs = [planned(open_checkpoint(folder), family_of(artifact.config), schemes) for folder in (source, artifact.folder)]
    chosen = VllmExport(format="vllm", layout="compressed-tensors")
    assert [chosen.predict_bytes(spec) for spec in specs] == [artifact.weight_bytes] * 2


@pytest.mark.parametrize("rounding", [scheme(2, 16), scheme(3, 32), scheme(3, -1, symmetric=True), scheme(8, 64)])
def test_compressed_tensors_holds_every_width(rounding: Scheme, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    schemes = round_checkpoint(source, tmp_path / "rounded", rounding)
    unpacked = dense(export("compressed-tensors", tmp_path / "rounded", tmp_path / "packed")[0])
    weights = exact_weights(source, schemes)
    assert len(weights) == len(schemes) > 0
    for name, weight in weights.items():
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
    other_keys = {key: value for key, value in awq.config.items() if key != "quantization_config"}
    assert other_keys == open_checkpoint(source).config
    shapes = {name.rpartition(".")[2]: entry.shape for name, entry in awq.tensors.items() if "k_proj" in name}
    assert shapes == {"qweight": (128, 8), "qzeros": (4, 8), "scales": (4, 64), "bias": (64,)}


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_side_files_are_copied_byte_for_byte(layout: Layout, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme(symmetric=True))
    export(layout, tmp_path / "rounded", tmp_path / "artifact")
    names = side_files(source)
    assert "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "artifact" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_shards_are_read_whole_and_the_size_is_predicted(layout: Layout, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source")
    schemes = round_checkpoint(source, tmp_path / "rounded", scheme(symmetric=layout == "gptq"), limit=200_000)
    assert len(list((tmp_path / "rounded").glob("model-*.safetensors"))) > 3
    artifact, _ = export(layout, tmp_path / "rounded", tmp_path / "artifact")
    assert torch.equal(
        dense(artifact)["model.layers.2.mlp.down_proj.weight"], exact_weights(source, schemes)["model.layers.2.mlp.down_proj"]
    )
    runs = [planned(open_checkpoint(folder), family_of(artifact.config), schemes) for folder in (source, tmp_path / "rounded")]
    chosen = VllmExport(format="vllm", layout=layout)
    assert [chosen.predict_bytes(spec) for spec in runs] == [artifact.weight_bytes] * 2


def test_the_same_checkpoint_gives_the_same_files(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    round_checkpoint(source, tmp_path / "rounded", scheme())
    for name in ("first", "second"):
        export("awq", tmp_path / "rounded", tmp_path / name)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert "model.safetensors" in first
    assert first == second


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
    schemes = {f"model.layers.0.mlp.{name}": scheme(4, 32) for name in ("gate_proj", "up_proj")}
    assert faults("awq", checkpoint, schemes) == [
        "model.layers.0.mlp.gate_proj (and 1 more): layout awq holds outputs by eights, not 196; set layout: compressed-tensors, "
        "or leave the layer out"
    ]
    assert faults("compressed-tensors", checkpoint, schemes)[0].startswith(
        "model.layers.0.mlp.gate_proj (and 1 more): 196 outputs at 4 bits do not fill 32-bit words, and vLLM cannot load"
    )
    assert faults("compressed-tensors", checkpoint, {name: scheme(4, 32, symmetric=True) for name in schemes}) == []


def test_what_the_gptq_layout_cannot_hold_is_refused_with_the_remedy(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1, intermediate=196))
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "o")]

    def of(held: Scheme) -> list[str]:
        return faults("gptq", checkpoint, dict.fromkeys(attention, held))

    others = f"{attention[0]} (and 3 more): "
    assert of(scheme(4, 32, symmetric=True)) == []
    assert of(scheme(3, 32, symmetric=True)) == [others + "layout gptq holds 4 or 8 bits, not 3; set layout: compressed-tensors"]
    assert of(scheme(4, 32)) == [
        others + "layout gptq holds symmetric grids alone; set symmetric: true on the stage, or set layout: compressed-tensors"
    ]
    assert of(scheme(4, 16, symmetric=True)) == [
        others + "vLLM loads layout gptq in groups of 32, 64 or 128, or -1, not 16; set such a group_size, or set layout: "
        "compressed-tensors"
    ]
    assert of(EIGHT_BITS[0]) == [
        others + "layout gptq holds integer weights alone, not rounded activations; set layout: compressed-tensors"
    ]
    assert of(EIGHT_BITS[2]) == [
        others + "layout gptq holds integer weights alone, not 8-bit floats; set layout: compressed-tensors"
    ]
    whole = {name: scheme(4, 32, symmetric=True) for name in attention}
    down = "model.layers.0.mlp.down_proj"
    assert faults("gptq", checkpoint, {**whole, down: scheme(8, -1, symmetric=True)}) == [
        f"{down}: layout gptq holds one width, 4 here, and not 8 too; set layout: compressed-tensors"
    ]
    assert faults("gptq", checkpoint, {**whole, down: scheme(4, 64, symmetric=True)}) == [
        f"{down}: layout gptq holds one group size, 32 here, and not 64 as well; set layout: compressed-tensors"
    ]
    assert faults("gptq", checkpoint, {down: scheme(4, -1, symmetric=True)})[0].startswith(
        f"{down}: layout gptq holds inputs and outputs in whole 32-bit words, which 128 × 196 at 4 bits do not fill"
    )
    assert faults("gptq", checkpoint, {})[0].startswith("layout gptq holds quantized weights, and no stage quantizes any")


def test_what_vllm_cannot_compute_is_refused_with_the_remedy(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1, vision_hidden=64))
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    for unsupported in (
        replace(EIGHT_BITS[0], bits=4),
        replace(EIGHT_BITS[0], group_size=32),
        replace(EIGHT_BITS[1], symmetric=False),
    ):
        assert "vLLM rounds inputs to integers only beside symmetric weights of 8 bits" in str(
            faults("compressed-tensors", checkpoint, dict.fromkeys(attention, unsupported))
        )
    blocks = EIGHT_BITS[4]  # k_proj has 64 outputs, and v_proj follows it
    (fault,) = faults("compressed-tensors", checkpoint, dict.fromkeys(attention, blocks))
    assert fault.startswith("model.layers.0.self_attn.k_proj: vLLM joins it with others, and its 64 outputs are no whole number of")
    assert "use a scale per output channel" in fault
    (fault,) = faults("compressed-tensors", checkpoint, {"visual.blocks.0.attn.qkv": blocks})
    assert fault.startswith("visual.blocks.0.attn.qkv: vLLM joins it with others, and its 64 outputs")
    assert faults("compressed-tensors", checkpoint, {"visual.blocks.0.attn.proj": blocks}) == []


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_scales_of_keys_and_values_need_a_layout_that_has_them(layout: Layout, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=2))
    schemes = {"model.layers.0.mlp.down_proj": scheme(4, 32, symmetric=True)}
    spec = planned(checkpoint, family_of(checkpoint.config), schemes, kv_cache=True)
    assert VllmExport(format="vllm", layout=layout).check(spec) == [
        f"layout {layout} has no place for the scales of keys and values; set layout: compressed-tensors, or remove kv_cache"
    ]
    packed = VllmExport(format="vllm", layout="compressed-tensors")
    assert packed.check(spec) == []
    without = planned(checkpoint, family_of(checkpoint.config), schemes)
    assert packed.predict_bytes(spec) == packed.predict_bytes(without) + 2 * 2 * 4


def test_one_is_told_what_a_cpu_cannot_serve_and_which_vllm_still_can(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1, intermediate=196))
    family = family_of(checkpoint.config)
    chosen = VllmExport(format="vllm", layout="compressed-tensors")

    def notes(held: dict[str, Scheme]) -> list[str]:
        return chosen.notes(planned(checkpoint, family, held))

    queries, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert notes({queries: scheme(4, 32), down: EIGHT_BITS[0]}) == []
    assert notes({queries: scheme(3, 32), down: scheme(4, 28)}) == [
        f"{queries}: vLLM's build for CPUs runs weights of 4 bits, not 3: this artifact needs a GPU",
        f"{down}: vLLM's build for CPUs runs sides that are multiples of 32, not 128 × 196: this artifact needs a GPU",
    ]
    assert notes({queries: EIGHT_BITS[2]}) == []
    assert "runs 8-bit floats without blocks, or on processors with AMX" in str(notes({queries: EIGHT_BITS[4]}))
    fixed, again = notes({queries: EIGHT_BITS[3]})
    assert "runs 8-bit floats without fixed scales of inputs" in fixed
    assert again.startswith(f"{queries}: vLLM joins it with others, gives them the largest of their scales and rounds them again")
    assert len(notes({down: EIGHT_BITS[3]})) == 1
    (note,) = chosen.notes(planned(checkpoint, replace(family, served_until="0.10.2"), {}))
    assert note.startswith(
        "vLLM served Qwen2_5_VLForConditionalGeneration up to version 0.10.2 and no later one does: serve it with"
    )


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_layers_that_vllm_joins_must_be_held_alike(layout: Layout, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1))
    schemes = {f"model.layers.0.self_attn.{name}": scheme(symmetric=True) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert faults(layout, checkpoint, schemes) == []
    del schemes["model.layers.0.self_attn.v_proj"]
    (fault,) = faults(layout, checkpoint, schemes)
    assert fault.startswith("model.layers.0.self_attn: vLLM joins q_proj, k_proj, v_proj into one layer")
    assert "leave all of them out" in fault


@pytest.mark.parametrize(
    ("family", "joined"),
    [
        ("blip-2", "language_model.model.decoder.layers.0.self_attn.{}_proj"),
        ("llava", "vision_tower.vision_model.encoder.layers.1.self_attn.{}_proj"),
        ("internvl3", "vision_tower.encoder.layer.0.attention.{}_proj"),
        ("clip", "text_model.encoder.layers.0.self_attn.{}_proj"),
    ],
)
def test_queries_keys_and_values_are_joined_in_every_part(family: str, joined: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[family](tmp_path / "source"))
    schemes = {joined.format(part): scheme(symmetric=True) for part in "qk"}
    assert all(f"{name}.weight" in checkpoint.tensors for name in schemes)
    (fault,) = faults("compressed-tensors", checkpoint, schemes)
    assert fault.startswith(f"{joined.rpartition('.')[0]}: vLLM joins q_proj, k_proj, v_proj into one layer")


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_blip_2_is_told_by_the_names_that_vllm_has(layout: Layout, tmp_path: Path) -> None:
    """vLLM builds this vision tower without a prefix, and asks for its modules' schemes without it."""
    source = build_blip2(tmp_path / "source")
    round_checkpoint(source, tmp_path / "rounded", scheme(symmetric=True))
    artifact, _ = export(layout, tmp_path / "rounded", tmp_path / "artifact")
    settings = artifact.config["quantization_config"]
    if layout == "gptq":
        assert not [name for name in settings["modules_in_block_to_quantize"] if not name.startswith("language_model.")]
    else:
        plain = ("vision_model.encoder.layers.0.mlp.fc1", ".encoder.layers.0.mlp.fc1", "language_model.lm_head")
        left = settings.get("modules_to_not_convert", plain)
        assert set(plain) <= set(left)
        assert not any(layout == "compressed-tensors" and group_of(settings, name) for name in plain)
    round_checkpoint(source, tmp_path / "seeing", scheme(4, 32), vision=lambda name: EIGHT_BITS[0] if "mlp" in name else None)
    seeing, _ = export("compressed-tensors", tmp_path / "seeing", tmp_path / "seen")
    assert group_of(seeing.config["quantization_config"], ".encoder.layers.0.mlp.fc1") == "group_1"
    assert quantized_linears(seeing) == quantized_linears(open_checkpoint(tmp_path / "seeing"))


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    ("family", "name", "part"),
    [
        ("blip-2", "language_projection", "language_projection"),
        ("blip-2", "qformer.encoder.layer.0.attention.attention.query", "qformer"),
        ("internvl3", "multi_modal_projector.linear_1", "model.multi_modal_projector"),
        ("clip", "visual_projection", "visual_projection"),
    ],
)
def test_modules_that_vllm_has_no_quantized_kernels_for_are_refused(
    layout: Layout, family: str, name: str, part: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(BUILDERS[family](tmp_path / "source"))
    (fault,) = faults(layout, checkpoint, {name: scheme(4, 32, symmetric=True)})
    assert fault == f"{name}: vLLM computes {part} of this architecture with plain weights alone; leave it out"


def test_gates_of_the_vision_tower_are_joined_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", layers=1))
    (fault,) = faults("compressed-tensors", checkpoint, {"visual.blocks.0.mlp.gate_proj": EIGHT_BITS[0]})
    assert fault.startswith("visual.blocks.0.mlp: vLLM joins gate_proj, up_proj into one layer")


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
