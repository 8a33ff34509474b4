"""Files that are laid out before their tensors are known, beside those of a writer that gets the tensors one by one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.checkpoints.checkpoint import TensorSpec
from compress.engine.planned_shards import PlannedShards
from compress.engine.weights import ShardWriter
from compress.errors import CheckpointError

TENSORS = {
    "layers.1.weight": torch.arange(300, dtype=torch.bfloat16).view(20, 15),
    "layers.0.shape": torch.tensor([3, 4]),
    "layers.0.codes": torch.arange(99, dtype=torch.uint8).view(9, 11),
    "layers.0.scale": torch.linspace(0, 1, 7),
    "empty": torch.empty(0, 4),
}
NAMES = {torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8", torch.float32: "F32"}
LIMITS = [700, 1400, 1 << 20]


def planned(work: Path, limit: int = 1 << 20) -> PlannedShards:
    specs = {name: TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    return PlannedShards.lay_out(work, specs, limit)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_files_are_those_that_a_writer_makes_in_whatever_order_tensors_come(tmp_path: Path, limit: int) -> None:
    target, expected = tmp_path / "target", tmp_path / "expected"
    target.mkdir()
    expected.mkdir()
    with ShardWriter(expected, limit) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    shards = planned(target / "work", limit)
    shards.create(target)
    for name in sorted(TENSORS):
        shards.write({name: TENSORS[name]})
    assert files_of(target) == {}  # nothing looks like a checkpoint before it is one
    shards.publish(target)
    assert files_of(target) == files_of(expected)
    assert len(files_of(target)) == {700: 4, 1400: 3, 1 << 20: 1}[limit]


def test_a_killed_run_goes_on_with_what_was_committed(tmp_path: Path) -> None:
    first = planned(tmp_path / "work", 700)
    first.create(tmp_path)
    first.write({name: TENSORS[name] for name in ("layers.1.weight", "layers.0.codes")})
    first.commit("layers.1", ["layers.1.weight"])
    again = planned(tmp_path / "work", 700)
    again.create(tmp_path)
    assert again.committed("layers.1") == ["layers.1.weight"]
    assert again.committed("layers.0") is None
    assert torch.equal(again.read("layers.1.weight"), TENSORS["layers.1.weight"])
    assert again.missing() == [name for name in TENSORS if name != "layers.1.weight"]


def test_a_run_that_was_killed_while_it_published_goes_on(tmp_path: Path) -> None:
    first = planned(tmp_path / "work", 700)
    first.create(tmp_path)
    first.write(TENSORS)
    first.commit("all", TENSORS)
    name = next(iter(first.headers))
    (tmp_path / "work" / name).replace(tmp_path / name)
    again = planned(tmp_path / "work", 700)
    again.create(tmp_path)
    assert again.missing() == []
    again.publish(tmp_path)
    assert len(files_of(tmp_path)) == len(first.headers) + 1


@pytest.mark.parametrize("damage", ["missing", "cut", "other plan", "commit"])
def test_what_is_damaged_or_of_another_plan_is_made_anew(tmp_path: Path, damage: str) -> None:
    shards = planned(tmp_path / "work")
    shards.create(tmp_path)
    shards.commit("all", TENSORS)
    (file,) = (tmp_path / "work").glob("*.safetensors")
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "commit":
        (tmp_path / "work" / "all.done.json").write_text('["layers.0.')
    else:
        shards = planned(tmp_path / "work", 700)
    shards.create(tmp_path)
    assert shards.committed("all") is None
    assert shards.missing() == list(TENSORS)


@pytest.mark.parametrize(
    ("name", "tensor"), [("layers.9", torch.ones(1)), ("layers.0.scale", torch.ones(8)), ("layers.0.scale", torch.ones(7).half())]
)
def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path, name: str, tensor: Tensor) -> None:
    shards = planned(tmp_path / "work")
    shards.create(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        shards.write({name: tensor})


def test_a_disk_that_is_too_small_is_noticed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        planned(tmp_path / "work").create(tmp_path)
