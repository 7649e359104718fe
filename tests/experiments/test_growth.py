"""Times by seed."""

import torch

from condzoo.experiments import collect, judge, load_experiment
from condzoo.experiments.claims import judge_claim
from condzoo.experiments.growth import timed
from condzoo.experiments.naive_cost import CLASSES, PIXELS, naive_counts
from condzoo.models import create_model


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


def test_the_naive_counts_are_of_the_networks_that_are_timed():
    point = {"examples": 5, "layers": 4, "widths": 7}
    model = create_model("mlp4x7", input_size=(1, PIXELS, PIXELS), num_classes=CLASSES)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    whole = sum(p.numel() for p in model.parameters())
    sides = [side for layer in layers for side in layer.weight.shape]
    assert naive_counts(point) == {
        "full": 5 * whole**2 + whole**3,
        "blocks": sum(5 * p**2 + p**3 for p in blocks),
        "kronecker": sum(5 * side**2 + side**3 for side in sides),
    }


def test_what_the_naive_counts_say_of_themselves_is_not_slower_than_naively():
    """The bound was the highest power of the count, which the exponent of a sum of powers never reaches."""
    experiment = load_experiment("cost")
    sizes = experiment.growth
    points = [
        {"seed": 1, "varied": name, **sizes.base, name: value}
        for name in ("examples", "layers", "widths")
        for value in getattr(sizes, name)
    ]
    slower = [claim for claim in experiment.claims if "slower" in claim.text]
    assert len(slower) == 4
    data = {"points": [point | {"seconds": naive_counts(point)} for point in points]}
    assert {judge_claim(claim, data, "cost").outcome for claim in slower} == {"did not hold"}
