from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

from compress.engine.replay import Positions, ReachedError
from compress.engine.statistics import InputStatistics, Observer, observe
from compress.errors import CheckpointError
from compress.numerics.rounding import PANEL
from tests.engine.test_replay import batches, open_walk
from tests.tiny import build_qwen2_5_vl


def test_sums_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    text = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    vision = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    statistics = InputStatistics()
    for chunk in inputs:
        statistics.add(chunk, Positions(text, vision))
    rows = {
        "text": torch.cat([chunk.view(10, 8)[text] for chunk in inputs]),
        "vision": torch.cat([chunk.view(10, 8)[vision] for chunk in inputs]),
    }
    for kind, expected in rows.items():
        sums = getattr(statistics, kind)
        torch.testing.assert_close(InputStatistics(text=sums).mean_hessian() * len(expected), expected.t() @ expected)
        torch.testing.assert_close(sums.abs_sum, expected.abs().sum(0))
        assert torch.equal(sums.abs_max, expected.abs().amax(0))
        assert sums.tokens == len(expected)
    everything = torch.cat(list(rows.values()))
    torch.testing.assert_close(statistics.mean_hessian(), everything.t() @ everything / len(everything))
    torch.testing.assert_close(statistics.mean_abs(), everything.abs().mean(0))
    torch.testing.assert_close(statistics.mean_square(), everything.square().mean(0))


class Counting(TorchDispatchMode):
    """Counts the tensors of at least so many elements that operations make anew."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        input_storages = {chunk.untyped_storage().data_ptr() for chunk in args if isinstance(chunk, Tensor)}
        if isinstance(result, Tensor) and result.numel() >= self.elements:
            self.made += result.untyped_storage().data_ptr() not in input_storages
        return result


def test_the_sum_over_both_kinds_of_tokens_takes_the_memory_of_one_matrix() -> None:
    width = 2 * PANEL + 7
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    text = torch.arange(20) < 12
    statistics = InputStatistics()
    statistics.add(rows, Positions(text, ~text))
    with Counting(width * width) as counting:
        hessian = statistics.mean_hessian()
    assert counting.made == 1
    assert torch.equal(hessian, hessian.t())
    torch.testing.assert_close(hessian, rows.t() @ rows / len(rows))


def test_merged_kinds_have_the_same_means_in_the_memory_of_one() -> None:
    rows = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    text = torch.arange(20) < 7
    statistics = InputStatistics(weights=(1.75, 0.5))
    statistics.add(rows, Positions(text, ~text))
    before = statistics.mean_hessian(), statistics.mean_abs(), statistics.abs_max()
    statistics.merge()
    assert statistics.vision is None
    for mean, same in zip((statistics.mean_hessian(), statistics.mean_abs(), statistics.abs_max()), before, strict=True):
        assert torch.equal(mean, same)
    statistics.merge()
    assert torch.equal(statistics.mean_hessian(), before[0])


def test_linears_with_one_input_share_their_sums() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) + self.k(x))

    block = Block()
    with torch.no_grad(), Observer(block, ("q", "k", "o")) as observer, pytest.raises(ReachedError):
        block(torch.ones(3, 4))
    assert observer.statistics["q"] is observer.statistics["k"]
    assert observer.statistics["q"] is not observer.statistics["o"]
    assert observer.statistics["q"].tokens == 3
    block(torch.ones(3, 4))  # nothing watches any more
    assert observer.statistics["q"].tokens == 3


def test_a_walked_block_counts_text_and_vision_tokens_and_no_padding(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path, dtype=torch.float32))
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(tmp_path).eval()
    name = "model.language_model.layers.1"
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])

    model.get_submodule(f"{name}.mlp.down_proj").register_forward_pre_hook(see)
    expected_inputs: dict[str, list[Tensor]] = {"text": [], "vision": []}
    with torch.no_grad():
        for batch in calibration:
            model(**batch.inputs(), use_cache=False)
            tokens, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"].bool()
            image = tokens == model.config.image_token_id
            expected_inputs["vision"].append(seen[-1][image & mask])
            expected_inputs["text"].append(seen[-1][~image & mask])
    assert any((batch.tensors["attention_mask"] == 0).any() for batch in calibration)
    replay = open_walk(tmp_path, calibration)
    statistics = next(observe(visit, ["mlp.down_proj"]) for visit in replay.walk(replay.decoder_units()) if visit.name == name)
    for kind, chunks in expected_inputs.items():
        rows = torch.cat(chunks)
        sums = getattr(statistics["mlp.down_proj"], kind)
        assert sums.tokens == len(rows)
        torch.testing.assert_close(InputStatistics(text=sums).mean_hessian() * len(rows), rows.t() @ rows)


def test_in_the_vision_tower_every_row_is_vision(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    replay = open_walk(tmp_path, calibration)
    visit = next(iter(replay.walk(replay.vision_units())))
    statistics = observe(visit, ["attn.qkv"])["attn.qkv"]
    assert statistics.text is None
    assert statistics.tokens == len(calibration[0].tensors["pixel_values"])


def test_padding_alone_is_an_error() -> None:
    statistics = InputStatistics()
    nothing = torch.zeros(4, dtype=torch.bool)
    statistics.add(torch.ones(1, 4, 2), Positions(nothing, nothing))
    with pytest.raises(CheckpointError, match="every sample is padding only"):
        statistics.mean_hessian()


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    build_qwen2_5_vl(tmp_path, dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layers.0.post_attention_layernorm.weight"):
            tensor.fill_(6e4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    replay = open_walk(tmp_path, batches(tmp_path))
    visit = next(iter(replay.walk(replay.decoder_units())))
    assert observe(visit, ["self_attn.q_proj"])["self_attn.q_proj"].tokens > 0
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: its input overflows in torch\.float16"):
        observe(visit, ["self_attn.q_proj", "mlp.up_proj"])
