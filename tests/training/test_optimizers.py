"""The optimizer is the one the recipe names, and its state goes to flat tensors and back."""

from typing import Any

import pytest
import torch
from torch import nn

from condzoo.training.optimizers import load_optimizer_tensors, optimizer_tensors, set_learning_rate
from condzoo.training.preparation import prepare, training_steps
from condzoo.training.steps import take_step

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("table", "reference"),
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}, torch.optim.SGD),
        ({"name": "gd", "lr": 0.1}, torch.optim.SGD),
        ({"name": "adam", "lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.01}, torch.optim.Adam),
        ({"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_steps_equal_torchs_optimizer(table: dict[str, Any], reference: type, tiny: Any) -> None:
    training = prepare(tiny(optim=table), CPU)
    twin = prepare(tiny(optim=table), CPU).model
    optimizer = reference(twin.parameters(), **{k: v for k, v in table.items() if k != "name"})
    for batch, again in zip(training_steps(training, 0, 3), training_steps(training, 0, 3), strict=True):
        take_step(training, batch)
        optimizer.zero_grad()
        for x, y in again.chunks:
            (nn.functional.cross_entropy(twin(x), y) * (len(y) / again.images)).backward()
        optimizer.step()
    for ours, theirs in zip(training.model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_decay_norm_false_spares_every_one_dimensional_parameter(tiny: Any) -> None:
    changes = {"model.name": "mlp4x24_bn", "optim.weight_decay": 0.1, "optim.decay_norm": False}
    groups = prepare(tiny(**changes), CPU).optimizer.param_groups
    decay = {p.ndim > 1: g["weight_decay"] for g in groups for p in g["params"]}
    assert decay == {True: 0.1, False: 0.0}
    everything = prepare(tiny(**{**changes, "optim.decay_norm": True}), CPU).optimizer.param_groups
    assert [g["weight_decay"] for g in everything] == [0.1]


def test_learning_rate_is_set_in_every_group(tiny: Any) -> None:
    optimizer = prepare(tiny(**{"optim.decay_norm": False}), CPU).optimizer
    set_learning_rate(optimizer, 0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_state_comes_back_with_its_memory_format(name: str, tiny: Any) -> None:
    optim = {"name": name, "lr": 0.01} | ({"momentum": 0.9} if name == "sgd" else {})
    recipe = tiny(**{"model.name": "cifar_resnet8", "optim": optim})
    training, other = prepare(recipe, CPU), prepare(recipe, CPU)
    take_step(training, next(training_steps(training, 0, 1)))
    stored = {key: value.contiguous() for key, value in optimizer_tensors(training.optimizer).items()}
    load_optimizer_tensors(other.optimizer, stored)
    parameters = zip(training.model.parameters(), other.model.parameters(), strict=True)
    for ours, theirs in parameters:
        before, after = training.optimizer.state[ours], other.optimizer.state[theirs]
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key])
            strides = zip(value.shape, value.stride(), after[key].stride(), strict=True)
            assert all(a == b for size, a, b in strides if size > 1)
