"""Times by seed."""

import torch

from condzoo.experiments import collect, judge
from condzoo.experiments.growth import timed


def test_every_seed_is_measured_and_judged(tiny, tmp_path):
    data = collect(tiny("cost"), "cpu", tmp_path, seeds=[4, 5])
    assert [point["seed"] for point in data["points"]] == [4] * 6 + [5] * 6
    assert all(set(verdict.values) == {4, 5} for verdict in judge(tiny("cost"), data))


def test_the_network_is_drawn_without_seeding_gpus(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    timed({"layers": 2, "widths": 4, "examples": 8}, repeats=1, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
