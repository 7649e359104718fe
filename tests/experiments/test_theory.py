"""Theorem 2 with an eps that is not 0; and what a probe that measures nothing would make of the theorems."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from condzoo.experiments import draw, judge, load_experiment
from condzoo.experiments.schema import TheorySettings
from condzoo.experiments.theory import collect_theory, draw_trial, errors_at, proposition_1, theorem_1, theorem_2
from condzoo.probe import KroneckerSpectrum, measure


def test_the_error_of_theorem_2_is_proportional_to_eps():
    found = theorem_2(torch.Generator().manual_seed(1))
    assert found["eps_exponent"] == pytest.approx(1.0, abs=0.1)
    assert max(found[key] for key in ("input", "output_grad", "weight_grad")) < 1e-8


def test_errors_at_an_eps_leave_the_trial_as_it_was():
    trial = draw_trial(torch.Generator().manual_seed(2), norm=True)
    before = {key: value.clone() for key, value in trial.model.state_dict().items()}
    first = errors_at(trial, 1e-5)
    assert errors_at(trial, 1e-5) == first
    assert max(first.values()) == pytest.approx(100 * max(errors_at(trial, 1e-7).values()), rel=0.1)
    assert all(torch.equal(before[key], value) for key, value in trial.model.state_dict().items())


def test_proposition_1_looks_at_the_fisher_that_the_probe_shows(monkeypatch):
    found = proposition_1(torch.Generator().manual_seed(1))
    assert max(found["lambda_max"], found["spectrum"]) < 1e-10
    assert found["kappa"] < 1e-4
    monkeypatch.setattr(KroneckerSpectrum, "lambda_max", property(lambda self: 1.01 * top(self)))
    assert proposition_1(torch.Generator().manual_seed(1))["lambda_max"] == pytest.approx(0.01)


def test_proposition_1_looks_at_moments_that_the_probe_did_not_form(monkeypatch):
    """Both factors twice what they are: their products' spectrum agrees with itself, and not with the moments'."""

    def doubled(*args, **settings):
        layers = measure(*args, **settings)
        for layer in layers.values():
            layer.input.eigenvalues.mul_(2)
            layer.output_grad.eigenvalues.mul_(2)
        return layers

    monkeypatch.setattr("condzoo.experiments.theory.measure", doubled)
    assert proposition_1(torch.Generator().manual_seed(1))["lambda_max"] == pytest.approx(3.0)


def top(fisher: KroneckerSpectrum) -> float:
    """lambda_max of a product, of its factors."""
    return fisher.input.lambda_max * fisher.output_grad.lambda_max


def layer_of(value: float) -> SimpleNamespace:
    moment = SimpleNamespace(lambda_max=value)
    return SimpleNamespace(input=moment, output_grad=moment, weight_grad=value)


def test_a_probe_that_measures_nan_proves_no_theorem(monkeypatch, tmp_path):
    """One layer's NaN beside exact ones is kept as null, out of every bound, and can be drawn."""

    def measured(trial, mu):
        return {f"fc{k}": layer_of(math.nan if k == 1 else 1.0) for k in range(len(trial.factors))}

    monkeypatch.setattr("condzoo.experiments.theory.measured_with", measured)
    found = collect_theory(TheorySettings(statement="theorem_1", trials=2), [1, 2])
    assert [row["errors"] for row in found["trials"]] == [{"input": None, "output_grad": None, "weight_grad": None}] * 4
    made = {"hardware": "any", "date": "today"}
    data = {"id": "thm1", "scale": "cpu", "seeds": [1, 2], "reductions": [], "made": made, **found}
    data = json.loads(json.dumps(data, allow_nan=False))
    assert {verdict.outcome for verdict in judge(load_experiment("thm1"), data)} == {"did not hold"}
    draw(load_experiment("thm1"), data, tmp_path / "figure.png")
    for errors in (data["trials"][0]["errors"], data["trials"][2]["errors"]):
        errors.update(dict.fromkeys(errors, 0.0))  # beside one that is known
    draw(load_experiment("thm1"), data, tmp_path / "figure.png")


@pytest.mark.parametrize("left", [0, 1])
def test_a_probe_that_measures_fewer_layers_proves_no_theorem(left, monkeypatch):
    first = {f"fc{k}": layer_of(1.0) for k in range(left)}
    monkeypatch.setattr("condzoo.experiments.theory.measured_with", lambda trial, mu: first)
    monkeypatch.setattr("condzoo.experiments.theory.measure", lambda *args, **settings: first)
    for statement in (theorem_1, theorem_2, proposition_1):
        with pytest.raises(RuntimeError, match=rf"{left} of the network's \d linear layers were measured"):
            statement(torch.Generator().manual_seed(1))
