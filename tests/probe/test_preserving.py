"""Measurements in the middle of a training step, between its forward and its backward pass."""

import pytest
import torch
import torch.nn.functional as F

from condzoo.probe import curvature, measure


@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_measurement_between_forward_and_backward_leaves_the_step_as_it_was(kit, labels):
    x, y = kit.images()
    grads = []
    for between in (False, True):
        model = kit.build("residual")
        loss = F.cross_entropy(model(x), y)
        if between:
            measure(model, (x[:5], y[:5]), labels=labels)
            curvature(model, x[:3], y[:3], "grad_moment", block="7")
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
