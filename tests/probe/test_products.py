"""Layers that read the same tensor: their product is taken once, and only where it is the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condzoo.probe import Conditioning, arithmetic, measure, products
from condzoo.probe.products import Product, SharedProducts


class Two(nn.Module):
    """Two layers on one tensor, with three logits."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        out = self.first(x).flatten(1).sum(1, keepdim=True)
        return out * self.second(x).flatten(1)[:, :3]


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the data that float64 products were taken of."""
    shapes: list[tuple[int, ...]] = []
    take = arithmetic.gram_float64

    def gram(columns: Tensor) -> Tensor:
        shapes.append(tuple(columns.shape))
        return take(columns)

    monkeypatch.setattr(arithmetic, "gram_float64", gram)
    return shapes


def measured(network: nn.Module, x: Tensor, **settings: str) -> Conditioning:
    torch.manual_seed(0)
    batch = x, torch.randint(3, (len(x),))
    return measure(network, [batch], precision="float64", **settings)  # type: ignore[arg-type]


def test_layers_on_one_tensor_share_its_product(grams: list[tuple[int, ...]]) -> None:
    c = measured(Two(nn.Linear(5, 4), nn.Linear(5, 3)), torch.randn(64, 5))
    assert grams.count((1, 1, 5, 64)) == 1
    first, second = (c.layers[name].input.eigenvalues for name in ("first", "second"))
    assert (first == second).all()
    assert second.max() > 0


def test_each_further_batch_is_added_to_each_layer(grams: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(32, 5), torch.randint(3, (32,))) for _ in range(3)]
    network = Two(nn.Linear(5, 4), nn.Linear(5, 3))
    c = measure(network, batches, precision="float64")
    rows = torch.cat([x for x, _ in batches]).double()
    expected = torch.linalg.eigvalsh(rows.T @ rows / 96).flip(0).numpy()
    assert grams.count((1, 1, 5, 32)) == 3
    for name in ("first", "second"):
        assert c.layers[name].input.eigenvalues == pytest.approx(expected, rel=1e-6)


def test_a_batch_whose_memory_is_filled_anew_is_read_anew() -> None:
    held = np.zeros((32, 5), dtype=np.float32)
    x, y = torch.from_numpy(held), torch.arange(32) % 3  # numpy writes without x's version changing
    rows = np.random.default_rng(0).standard_normal((3, 32, 5)).astype(np.float32)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in rows:
            held[:] = part
            yield x, y

    c = measure(nn.Linear(5, 3), batches(), precision="float64")
    expected = np.linalg.eigvalsh(np.einsum("bni,bnj->ij", *[rows.astype(np.float64)] * 2) / 96)[::-1]
    assert c.layers[""].input.eigenvalues == pytest.approx(expected, rel=1e-6)


def test_a_tensor_written_to_between_is_read_again() -> None:
    shared = SharedProducts()
    x = torch.ones(3)
    made = [shared.once(x, part, lambda: Product(torch.ones(1, 1, 1), 0.0)) for part in (0, 0, 1)]
    x.mul_(2)
    made.append(shared.once(x, 0, lambda: Product(torch.ones(1, 1, 1), 0.0)))
    assert [made[0] is other for other in made] == [True, True, False, False]


def test_products_are_kept_while_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "KEPT", 2)
    shared, made = SharedProducts(), []

    def make() -> Product:
        made.append(1)
        return Product(torch.ones(1, 1, 1), 0.0)

    tensors = [torch.ones(1) for _ in range(4)]
    for x in (*tensors, *reversed(tensors)):  # two are kept
        shared.once(x, 0, make)
    assert len(made) == 6
    with torch.inference_mode():
        x = torch.ones(1)
    for _ in range(2):
        shared.once(x, 0, make)  # has no version that would tell of a change
    assert len(made) == 8


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"groups": 2}],
    ids=str,
)
def test_patches_of_another_geometry_are_others(other: dict[str, int]) -> None:
    x = torch.randn(64, 16, 9, 9)
    apart = [nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, **other)]  # type: ignore[arg-type]
    together = measured(Two(*apart), x, conv="patches")
    for place, name in ((0, "first"), (1, "second")):
        alone = Two(nn.Conv2d(16, 16, 1), apart[place])
        expected = measured(alone, x, conv="patches").layers["second"].input
        assert together.layers[name].input.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-12)
