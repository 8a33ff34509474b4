from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from compress.engine import products


@pytest.fixture(autouse=True)
def _without_16_bit_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_emulated", lambda: frozenset({torch.bfloat16, torch.float16}))
    monkeypatch.setattr(products, "_ROWS", 7)
    monkeypatch.setattr(products, "_ELEMENTS", 3 * 48)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_the_exact_one_rounded_once(dtype: torch.dtype, with_bias: bool) -> None:
    linear = torch.nn.Linear(48, 20, bias=with_bias, dtype=dtype)
    inputs = random(3, 5, 48, dtype=dtype)
    with products.float32_products("cpu"):
        outputs = linear(inputs)
    exact = inputs.double() @ linear.weight.double().t() + (linear.bias.double() if with_bias else 0)
    assert outputs.dtype == dtype
    assert outputs.shape == (3, 5, 20)
    # half a unit in the last place, and the float32 sum's own error
    assert ((outputs.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-5).all()


def test_other_types_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Tensor] = []
    plain = cast("Callable[..., Tensor]", vars(products)["_linear"])

    def count(*args: Any) -> Tensor:
        replaced.append(args[0])
        return plain(*args)

    monkeypatch.setattr(products, "_linear", count)
    weights = {dtype: random(4, 48, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    with products.float32_products("cpu"):
        for dtype, weight in weights.items():
            torch.nn.functional.linear(random(2, 48, dtype=dtype), weight)
    assert [inputs.dtype for inputs in replaced] == [torch.bfloat16]
    with products.float32_products("meta"):
        torch.nn.functional.linear(random(2, 48, dtype=torch.bfloat16), weights[torch.bfloat16])
    torch.nn.functional.linear(random(2, 48, dtype=torch.bfloat16), weights[torch.bfloat16])
    assert len(replaced) == 1
