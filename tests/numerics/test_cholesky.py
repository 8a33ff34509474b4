from typing import cast

import pytest
import torch
from torch import Tensor

from compress.numerics.cholesky import factor, permute


def symmetric(size: int, tokens: int) -> Tensor:
    rows = torch.randn(tokens, size, generator=torch.Generator().manual_seed(size))
    return rows.t() @ rows / tokens


@pytest.mark.parametrize("size", [1, 300, 512, 1200])
def test_the_factor_is_that_of_the_library(size: int) -> None:
    matrix = symmetric(size, 2 * size)
    expected = cast("Tensor", torch.linalg.cholesky(matrix.double() + 0.01 * torch.eye(size)))
    assert factor(matrix, 0.01)
    torch.testing.assert_close(matrix.tril().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", [3, 700, 1199])
def test_a_matrix_without_a_factor_stays_as_it_was(place: int) -> None:
    matrix = symmetric(1200, 2400)
    matrix[place, place] = -5
    before = matrix.clone()
    assert not factor(matrix, 1e-3)
    assert torch.equal(matrix, before)


def test_rows_and_columns_change_their_places() -> None:
    matrix = symmetric(1100, 50)
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    expected = matrix[order][:, order]
    permute(matrix, order)
    assert torch.equal(matrix, expected)
