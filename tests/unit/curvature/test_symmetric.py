"""AA' in blocks equals the product, for any size beside the blocks'."""

from __future__ import annotations

import pytest
import torch

from hfdist.curvature import symmetric
from hfdist.curvature.symmetric import add_upper, mirror, product_of_parts


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20, 24, 25])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_make_the_whole_product(
    n: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "BLOCK", 8)
    torch.manual_seed(0)
    parts = [torch.randn(m, n, dtype=torch.float64).T for m in (5, 3)]  # as rows of a Jacobian
    if not is_transposed:
        parts = [part.contiguous() for part in parts]
    G = torch.zeros(n, n, dtype=torch.float64)
    for part in parts:
        add_upper(G, part)
    torch.testing.assert_close(mirror(G), sum(part @ part.T for part in parts))


@pytest.mark.parametrize("sizes", [(1,), (20,), (9, 1, 24), (3, 8)])
def test_rows_that_lie_apart(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "BLOCK", 8)
    torch.manual_seed(0)
    parts = [torch.randn(n, 5, dtype=torch.float64) for n in sizes]
    whole = torch.cat(parts)
    torch.testing.assert_close(product_of_parts(parts), whole @ whole.T)


def test_blocks_are_of_nearly_equal_length_and_cover_all_rows() -> None:
    for n in (1, 255, 256, 257, 449, 6000):
        blocks = list(symmetric._blocks(n))
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
        lengths = [stop - start for start, stop in blocks]
        assert sum(lengths) == n
        assert max(lengths) <= min(lengths) + 1 <= symmetric.BLOCK + 1
