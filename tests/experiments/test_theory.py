"""Theorem 2 with an eps that is not 0."""

import pytest
import torch

from condzoo.experiments.theory import draw_trial, errors_at, theorem_2


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
