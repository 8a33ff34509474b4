from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from compress.engine.host import HostMemory, map_tensors
from compress.errors import StoreError


def test_tensors_past_the_limit_go_to_scratch_files(tmp_path: Path) -> None:
    host = HostMemory(tmp_path, limit=100)
    first, second, third = (host.offload(torch.full((16,), float(number))) for number in range(3))
    assert host.resident == 64
    assert [tensor.tolist() for tensor in (first, second, third)] == [[float(number)] * 16 for number in range(3)]
    assert list(tmp_path.iterdir()) == []  # scratch files have no name
    del first
    assert host.resident == 0
    assert host.offload(torch.ones(20)).sum() == 20


def test_what_is_kept_does_not_follow_its_source(tmp_path: Path) -> None:
    source = torch.zeros(4)
    for limit in (1000, 0):
        copy = HostMemory(tmp_path, limit).offload(source)
        source += 1
        assert not torch.equal(copy, source)


def test_a_slice_is_kept_as_one(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).view(2, 6, 5)
    for limit in (1000, 0):
        host = HostMemory(tmp_path, limit)
        for copy, strides in ((tensor[:, 1:], (30, 5, 1)), (tensor.transpose(0, 1), (5, 30, 1)), (tensor[:, :1], (5, 5, 1))):
            assert torch.equal(host.offload(copy), copy)
            assert host.offload(copy).stride() == strides
        assert host.offload(tensor[0, 0].expand(3, 5)).stride() == (5, 1)


def test_a_scratch_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone: cannot be written .*; 16 bytes of activations"):
        HostMemory(tmp_path / "gone", limit=0).offload(torch.zeros(4))


def test_every_container_is_mapped() -> None:
    class Point(NamedTuple):
        x: Tensor
        y: int

    @dataclass
    class Record:
        inner: Tensor
        name: str

    tree = (torch.ones(1), [torch.ones(1), None], {"k": Point(torch.ones(1), 3)}, Record(torch.ones(1), "n"))
    mapped = map_tensors(tree, lambda tensor: tensor + 1)
    assert mapped[0].item() == 2
    assert mapped[1][0].item() == 2
    assert mapped[1][1] is None
    assert mapped[2]["k"].x.item() == 2
    assert mapped[2]["k"].y == 3
    assert (mapped[3].inner.item(), mapped[3].name) == (2, "n")
    subclasses = map_tensors(
        {"d": type("Named", (dict,), {})(k=torch.ones(1)), "l": type("Listed", (list,), {})([torch.ones(1)])}, len
    )
    assert subclasses == {"d": {"k": 1}, "l": [1]}
    pooled: Any = (torch.ones(1),)
    output = map_tensors(BaseModelOutputWithPooling(pooler_output=pooled), lambda tensor: tensor + 1)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert output.pooler_output[0].item() == 2  # pyright: ignore[reportOptionalSubscript]
    assert output.last_hidden_state is None
