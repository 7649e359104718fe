"""Networks measured at their initialization."""

import torch

from condzoo.experiments.initialization import measure_network
from condzoo.experiments.schema import InitializationSettings

SETTINGS = InitializationSettings(
    models={"plain": "mlp3x8"}, matrices=["grad_moment"], examples=32, p=[0.5], data={"name": "digits"}
)


def test_the_network_is_drawn_without_seeding_what_its_caller_draws(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(123)
    seeded.clear()
    before = torch.get_rng_state()
    first = measure_network("mlp3x8", SETTINGS, 1, None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert measure_network("mlp3x8", SETTINGS, 1, None) == first
    assert measure_network("mlp3x8", SETTINGS, 2, None) != first
    assert not seeded
