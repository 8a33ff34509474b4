from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.data.images import decode_image
from compress.engine.products import float32_products
from compress.engine.replay import Replay, WalkConfig
from compress.engine.statistics import observe
from compress.engine.weights import WeightReader, map_tensor
from compress.errors import CheckpointError
from compress.families import Family
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.families.resolve import family_of
from tests.tiny import build_qwen2_5_vl, build_qwen2_vl, picture

PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
IMAGE, VIDEO, START, END = 290, 291, 292, 293


@dataclass(frozen=True)
class Fixed:
    tensors: dict[str, Tensor]

    def inputs(self) -> dict[str, Tensor]:
        return dict(self.tensors)


def batches(folder: Path) -> list[Fixed]:
    """Two questions of unlike length with an image each, padded; and two lines of text."""
    processor = cast("Any", AutoProcessor).from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    texts = [PROMPT.format(text) for text in ("What?", "How many circles, squares and triangles are there?")]
    images = [decode_image(picture(1), "one"), decode_image(picture(2, 140, 84), "two")]
    mixed = processor(text=texts, images=images, padding=True, return_tensors="pt")
    plain = processor(text=["The river rises in the northern hills."] * 2, return_tensors="pt")
    return [Fixed(dict(mixed)), Fixed(dict(plain))]


def build_qwen3_vl(folder: Path) -> Family:
    """Write a tiny Qwen3-VL: its decoder adds features of the vision tower's blocks between its own first blocks."""
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 300,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen3VLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return replace(QWEN2_5_VL, name="qwen3-vl", model_type="qwen3_vl", renames=())


def qwen3_vl_batches() -> list[Fixed]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 280, (1, 9), generator=generator)
    tokens = torch.cat([torch.tensor([[START, *[IMAGE] * 4, END]]), words], dim=1)
    types = (tokens == IMAGE).int()
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    pictured = {
        "input_ids": tokens,
        "mm_token_type_ids": types,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return [Fixed(pictured), Fixed({"input_ids": words})]


def plain_outputs(
    folder: Path, calibration: list[Fixed], names: list[str], change: Callable[[Any], None] | None = None
) -> dict[str, list[Tensor]]:
    """Return what parts of the model, perhaps changed, return in plain forwards, by transformers alone."""
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype="auto").eval()
    if change is not None:
        change(model)
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name].append(output)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad(), float32_products("cpu"):  # the kernels that the walk takes here
        for batch in calibration:
            model(**batch.inputs(), use_cache=False)
    return outputs


def open_walk(folder: Path, calibration: list[Fixed], family: Family | None = None, host_bytes: int = 1 << 30) -> Replay:
    checkpoint = open_checkpoint(folder)
    return Replay(WalkConfig(checkpoint, family or family_of(checkpoint.config), calibration, "cpu", folder, host_bytes))


def assert_walk_equals(replay: Replay, units: list[str], expected: dict[str, list[Tensor]]) -> list[str]:
    visited: list[str] = []
    for visit in replay.walk(units):
        visited.append(visit.name)
        outputs = [visit.run(call) for call in visit.calls]
        assert len(outputs) == len(expected[visit.name])
        assert all(torch.equal(actual, reference) for actual, reference in zip(outputs, expected[visit.name], strict=True)), (
            visit.name
        )
    return visited


@pytest.mark.parametrize("build", [build_qwen2_5_vl, build_qwen2_vl])
def test_every_block_returns_what_it_does_in_a_plain_forward(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    calibration = batches(build(tmp_path))
    replay = open_walk(tmp_path, calibration)
    units = [*replay.decoder_units(), "lm_head"]
    assert len(units) == 4
    assert assert_walk_equals(replay, units, plain_outputs(tmp_path, calibration, units)) == units


def test_the_vision_tower_is_walked_before_the_decoder(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path, vision_blocks=4))
    replay = open_walk(tmp_path, calibration)
    expected = plain_outputs(tmp_path, calibration, [*replay.vision_units(), *replay.decoder_units()])
    assert_walk_equals(replay, replay.vision_units(), expected)
    assert_walk_equals(replay, replay.decoder_units(), expected)


def test_what_is_added_between_blocks_is_replayed(tmp_path: Path) -> None:
    family = build_qwen3_vl(tmp_path)
    calibration = qwen3_vl_batches()
    replay = open_walk(tmp_path, calibration, family)
    units = replay.decoder_units()
    assert_walk_equals(replay, units, plain_outputs(tmp_path, calibration, units))


def test_activations_that_spill_are_the_same(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    replay = open_walk(tmp_path, calibration, host_bytes=0)
    units = replay.decoder_units()
    assert_walk_equals(replay, units, plain_outputs(tmp_path, calibration, units))
    assert replay.host.resident == 0


def forwards(replay: Replay, units: list[str]) -> list[int]:
    """Return how many forwards of the whole model were begun when each part was visited."""
    begun: list[int] = []
    replay.model.register_forward_pre_hook(lambda module, args: begun.append(1))
    return [len(begun) for _ in replay.walk(units)]


def test_blocks_fed_by_the_one_before_need_no_further_forward(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    replay = open_walk(tmp_path, calibration)
    assert forwards(replay, replay.decoder_units()) == [2, 2, 2]


def test_outputs_are_let_go_once_the_next_part_has_them(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path, layers=6, vision_blocks=6))
    replay = open_walk(tmp_path, calibration)
    expected = plain_outputs(tmp_path, calibration, [*replay.vision_units(), *replay.decoder_units(), "lm_head"])
    for units in (replay.vision_units(), [*replay.decoder_units(), "lm_head"]):
        resident: list[int] = []
        for visit in replay.walk(units):
            resident.append(replay.host.resident)
            outputs = [visit.run(call) for call in visit.calls]
            assert all(torch.equal(actual, reference) for actual, reference in zip(outputs, expected[visit.name], strict=True)), (
                visit.name
            )
        assert len(resident) == 7
        assert max(resident[2:-1]) <= resident[1]
        assert resident[-1] <= resident[1] + sum(output.nbytes for output in expected[units[-2]])


def test_outputs_that_are_read_by_others_than_the_next_block_are_kept(tmp_path: Path) -> None:
    family = build_qwen3_vl(tmp_path)
    calibration = qwen3_vl_batches()
    replay = open_walk(tmp_path, calibration, family)
    expected = plain_outputs(tmp_path, calibration, [*replay.vision_units(), *replay.decoder_units(), "lm_head"])
    assert_walk_equals(replay, replay.vision_units(), expected)
    assert_walk_equals(replay, [*replay.decoder_units(), "lm_head"], expected)


def add_first_output(model: Any) -> None:
    """Let a model's vision tower hold what its first block returns, and add its mean to its own result at the very end."""
    tower = model.get_submodule("model.visual")
    forward = tower.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        references: list[Tensor] = []

        def hold(module: nn.Module, args: object, output: Tensor) -> None:
            references.append(output)

        hook = tower.blocks[0].register_forward_hook(hold)
        try:
            result = forward(*args, **kwargs)
        finally:
            hook.remove()
        result.pooler_output = result.pooler_output + references[0].mean()
        return result

    tower.forward = run


def test_outputs_that_are_held_to_the_end_are_kept(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path, vision_blocks=4))
    replay = open_walk(tmp_path, calibration)
    add_first_output(replay.model)
    units = replay.vision_units()
    assert [visit.name for visit in replay.walk(units)] == units
    expected = plain_outputs(tmp_path, calibration, replay.decoder_units(), add_first_output)
    assert_walk_equals(replay, replay.decoder_units(), expected)


def test_only_what_needs_it_is_replayed(tmp_path: Path) -> None:
    family = build_qwen3_vl(tmp_path)
    replay = open_walk(tmp_path, qwen3_vl_batches(), family)
    assert forwards(replay, replay.decoder_units()) == [2, 3, 4, 4]  # deepstack ends after two blocks; text alone has none


def test_later_blocks_see_what_was_changed_in_earlier_ones(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    replay = open_walk(tmp_path, calibration)
    units = replay.decoder_units()
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(tmp_path, dtype="auto").eval()
    model.get_submodule(units[0]).mlp.down_proj.weight.data *= 0.5
    expected: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        expected.append(output)

    model.get_submodule(units[-1]).register_forward_hook(keep)
    with torch.no_grad(), float32_products("cpu"):  # the kernels that the walk takes here
        for batch in calibration:
            model(**batch.inputs(), use_cache=False)
    last: list[bool] = []
    for visit in replay.walk(units):
        if visit.name == units[0]:
            block: Any = visit.module
            block.mlp.down_proj.weight = nn.Parameter(block.mlp.down_proj.weight * 0.5, requires_grad=False)
        if visit.name == units[-1]:
            last = [torch.equal(visit.run(call), output) for call, output in zip(visit.calls, expected, strict=True)]
    assert last == [True] * len(calibration)


def test_only_one_block_has_weights_at_a_time(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path, layers=6)
    replay = open_walk(tmp_path, batches(tmp_path))
    total = open_checkpoint(tmp_path).weight_bytes
    live: list[int] = []
    for visit in replay.walk(replay.decoder_units()):
        real = [tensor for tensor in replay.model.state_dict().values() if not tensor.is_meta]
        live.append(sum(tensor.nbytes for tensor in real))
        block = sum(tensor.nbytes for tensor in visit.module.state_dict().values())
        assert live[-1] - block <= 256  # the norm after the blocks
    assert max(live) < total / 6


def test_an_image_tower_is_read_once_and_only_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, text = batches(build_qwen2_5_vl(tmp_path))
    read: list[str] = []
    disk_tensor = WeightReader.disk_tensor

    def watched(reader: WeightReader, name: str, device: str = "cpu") -> Tensor:
        read.append(name)
        return disk_tensor(reader, name, device)

    monkeypatch.setattr(WeightReader, "disk_tensor", watched)
    replay = open_walk(tmp_path, [text, text])
    next(iter(replay.walk(replay.decoder_units())))
    assert read.count("model.embed_tokens.weight") == 1
    assert not any("visual" in name for name in read)
    read.clear()
    replay = open_walk(tmp_path, [text, mixed, mixed])
    next(iter(replay.walk(replay.decoder_units())))
    tower = [name for name in read if "visual" in name]
    assert len(set(tower)) == len(tower) == sum("visual" in name for name in open_checkpoint(tmp_path).tensors)


def test_the_image_tower_of_a_model_without_a_record_is_loaded_in_any_case(tmp_path: Path) -> None:
    text = batches(build_qwen2_5_vl(tmp_path))[1:]
    derived = replace(family_of(open_checkpoint(tmp_path).config), derived="from its modules")
    replay = open_walk(tmp_path, text, derived)
    devices: list[torch.device] = []
    entry = replay.model.get_submodule(derived.entry({}))
    entry.register_forward_pre_hook(lambda module, _: devices.append(next(module.parameters()).device))
    next(iter(replay.walk(replay.decoder_units())))
    # as Idefics3's own forward asks, before it calls anything
    assert devices == [torch.device("cpu")]


def test_an_image_tower_that_no_sample_reaches_is_an_error(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))[1:]
    replay = open_walk(tmp_path, calibration)
    visit = next(iter(replay.walk(replay.vision_units())))
    with pytest.raises(CheckpointError, match=r"visual.blocks.0: no calibration sample reaches it; add samples that do, images"):
        observe(visit, ["attn.qkv"])


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"intermediate_size": 256', '"intermediate_size": 320'))
    replay = open_walk(tmp_path, batches(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.gate_proj.weight has shape \[256, 128\], config.json asks for \[320, 128\]"
    ):
        next(iter(replay.walk(replay.decoder_units())))


def test_reading_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path))
    last = max(checkpoint.tensors.values(), key=lambda entry: entry.end)
    with last.file.open("rb+") as file:
        file.truncate(last.start)
    with pytest.raises(CheckpointError, match=f"{last.name} cannot be read"):
        map_tensor(last)
    assert WeightReader(checkpoint, family_of(checkpoint.config)).disk_names
