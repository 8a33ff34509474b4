import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.skeleton import build_skeleton
from compress.engine.weights import ShardWriter, WeightReader, is_finite, quantize_inputs, unload
from compress.errors import CheckpointError, StoreError
from compress.families.resolve import family_of
from compress.numerics.activations import fake_quantize_activations
from compress.numerics.scheme import Scheme
from tests.tiny import build_qwen2_5_vl

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b.bias": torch.tensor([1.5], dtype=torch.float16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d.empty": torch.empty(0, 5),
    "e.codes": torch.arange(5, dtype=torch.uint8),
}


def write(folder: Path, tensors: dict[str, Tensor], limit: int = 5_000_000_000) -> None:
    with ShardWriter(folder, limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


@pytest.mark.parametrize(
    ("second", "extra", "message"),
    [
        ((2, 6), 0, r"b overlaps another tensor \(byte \d+, not \d+\); fetch the file again"),
        ((0, 4), 0, "b overlaps another tensor"),
        ((6, 10), 0, r"b leaves a gap before it \(byte \d+, not \d+\)"),
        ((4, 8), 3, r"its tensors end at byte (\d+), the file at \d+"),
    ],
)
def test_tensors_that_do_not_stand_one_after_the_other(tmp_path: Path, second: tuple[int, int], extra: int, message: str) -> None:
    rows = {name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in (("a", (0, 4)), ("b", second))}
    header = json.dumps(rows).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(max(4, second[1]) + extra))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_one_file_reads_back_with_safetensors(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_shards_stay_under_the_limit_and_are_indexed(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((100,), float(number)) for number in range(10)}
    write(tmp_path, tensors, limit=2000)
    (tmp_path / "config.json").write_text("{}")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 4
    assert shards[0].name == "model-00001-of-00004.safetensors"
    assert all(shard.stat().st_size <= 2000 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    merged: dict[str, Tensor] = {}
    for shard in shards:
        merged |= load_file(shard)
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    files: list[bytes] = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, TENSORS)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_tensors_are_aligned_to_their_type(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(3, dtype=torch.uint8), "y": torch.ones(2, dtype=torch.int64)})
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).tensors["y"].start % 8 == 0


def test_a_name_added_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a is written twice"), ShardWriter(tmp_path) as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path) as writer:
        writer.add("a", torch.ones(1))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_how_much_was_needed(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.fail("this test needs a system with /dev/full")
    (tmp_path / ".shard-00001.data").symlink_to("/dev/full")
    with (
        pytest.raises(StoreError, match=r"the disk is full; 0 bytes .* 4,000,000 more did not fit") as caught,
        ShardWriter(tmp_path) as writer,
    ):
        writer.add("a", torch.ones(1_000_000))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}/gone: cannot write weights"), ShardWriter(tmp_path / "gone") as writer:
        writer.add("a", torch.ones(1))


def test_a_module_gets_its_weights_and_loses_them_again(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path))
    family = family_of(checkpoint.config)
    model: Any = build_skeleton(tmp_path, torch.bfloat16, torch.device("cpu"))
    block = model.model.language_model.layers[1]
    reader = WeightReader(checkpoint, family)
    reader.load(block, "model.language_model.layers.1")
    expected = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, value in block.state_dict().items():
        assert torch.equal(value, expected[reader.disk_names[f"model.language_model.layers.1.{name}"]])
    unload(block)
    assert all(value.is_meta for value in block.state_dict().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    build_qwen2_5_vl(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][3, 5] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp.up_proj.weight holds NaN or infinite values"):
        WeightReader(checkpoint, family_of(checkpoint.config)).disk_tensor(name)


def test_a_tensor_of_another_type_is_loaded_in_the_models(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("layers.1.input_layernorm.weight")]
    tensors[name] = tensors[name].float() * 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    model: Any = build_skeleton(tmp_path, torch.bfloat16, torch.device("cpu"))
    block = model.model.language_model.layers[1]
    reader = WeightReader(checkpoint, family_of(checkpoint.config))
    reader.load(block, "model.language_model.layers.1")
    assert torch.equal(block.input_layernorm.weight, tensors[name].to(torch.bfloat16))
    assert torch.equal(reader.disk_tensor(name), tensors[name])


def test_a_value_beyond_the_models_type_is_named(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path, dtype=torch.float16)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("layers.1.input_layernorm.weight")]
    tensors[name] = tensors[name].float() + 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    model: Any = build_skeleton(tmp_path, torch.float16, torch.device("cpu"))
    reader = WeightReader(checkpoint, family_of(checkpoint.config))
    with pytest.raises(CheckpointError, match=r"input_layernorm.weight is torch.float32 and overflows in torch.float16"):
        reader.load(model.model.language_model.layers[1], "model.language_model.layers.1")


def test_values_whose_sum_overflows_are_finite() -> None:
    assert is_finite(torch.full((1000,), 3e38))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
    assert is_finite(torch.tensor([1], dtype=torch.int64))
    assert is_finite(torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_one_value_anywhere_makes_a_tensor_not_finite(dtype: torch.dtype) -> None:
    for place in (0, 1, 17, 1000, 1999):
        # the 8-bit type has no infinity
        for bad in (float("nan"), *(() if dtype == torch.float8_e4m3fn else (float("inf"), float("-inf")))):
            values = torch.linspace(-3, 3, 2000)
            assert is_finite(values.to(dtype).view(40, 50))
            values[place] = bad
            assert not is_finite(values.to(dtype).view(40, 50))


def test_a_tensor_the_model_lacks_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds no tensor for the model's model\.nowhere.weight"):
        WeightReader(checkpoint, family_of(checkpoint.config)).tensor("model.nowhere.weight")


def test_a_tensor_is_mapped_and_let_go(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_qwen2_5_vl(tmp_path))
    reader = WeightReader(checkpoint, family_of(checkpoint.config))
    file = str(tmp_path / "model.safetensors")
    name = next(iter(checkpoint.tensors))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(os.path.realpath(file))

    before = mapped()
    tensor = reader.disk_tensor(name)
    assert mapped() == before + 1
    del tensor
    assert mapped() == before


def test_gradients_pass_through_the_rounding_of_inputs() -> None:
    linear = nn.Linear(8, 3, bias=False)
    scheme = Scheme(bits=8, group_size=-1, symmetric=True, activations="token")
    inputs = torch.linspace(-1, 2, 16).view(2, 8).requires_grad_()
    before = linear(inputs.detach())
    quantize_inputs(linear, scheme, None)
    output = linear(inputs)
    output.sum().backward()
    assert inputs.grad is not None and torch.equal(inputs.grad, linear.weight.detach().sum(dim=0).expand(2, 8))
    assert not torch.equal(output, before)
    with torch.no_grad():
        assert torch.equal(linear(inputs), linear(fake_quantize_activations(inputs, scheme)))
