"""Recipes small enough for a test: an MLP or a small ResNet on the embedded digits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from condzoo.training import Recipe
from condzoo.training.recipe import parse_recipe, set_field

TINY: dict[str, Any] = {
    "epochs": 2,
    "seed": 1,
    "log_every": 5,
    "model": {"name": "mlp4x24"},
    "data": {"name": "digits", "batch_size": 128},
    "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
}

MakeRecipe = Callable[..., Recipe]


def tiny_tables(changes: dict[str, Any]) -> dict[str, Any]:
    """The tables of a 22-step training (11 steps an epoch), with fields changed by their paths."""
    tables: dict[str, Any] = {}
    for table, entry in TINY.items():
        tables[table] = dict(entry) if isinstance(entry, dict) else entry
    for path, value in changes.items():
        set_field(tables, path, value)
    return tables


@pytest.fixture
def tiny() -> MakeRecipe:
    """tiny(**{"optim.lr": 0.5}): a recipe of 22 steps, with fields changed by their paths."""
    return lambda **changes: parse_recipe(tiny_tables(changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
