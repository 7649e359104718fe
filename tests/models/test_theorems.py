"""Theorems 1 and 2 of arXiv:2002.10801 (appendix), by plain autodiff on the zoo's MLPs in float64.

Layers k = 1 ... K; h_k is a linear layer's output, x_k what the next layer sees. The loss is linear in the logits,
so that its gradient there is the same fixed matrix, or mu times it, whatever the weights are.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from condzoo.models import create_model, init_weights

BATCH, CLASSES, PIXELS = 16, 4, 9
depths = st.integers(2, 7)
widths = st.integers(3, 12)
seeds = st.integers(0, 2**31)
scales = st.floats(0.1, 10.0)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: inputs x_k of the next layer, dL/dh_k and dL/dW_k, for k = 1 ... K."""

    x: list[Tensor]
    grad_h: list[Tensor]
    grad_weight: list[Tensor]


def build_mlp(layers: int, width: int, norm: bool, seed: int, eps: float = 1e-20) -> nn.Module:
    """An MLP without biases, its BN with random gamma and beta and the given eps."""
    torch.manual_seed(seed)
    name = f"mlp{layers}x{width}" + ("_bn" if norm else "")
    model = create_model(name, bias=False, input_size=(1, 3, 3), num_classes=CLASSES, init="he").double().train()
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm1d):
            bn.eps = eps
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, -0.1, 0.1)  # so small that no unit dies
    return model


def run(model: nn.Module, seed: int, mu: float = 1.0) -> Pass:
    """Forward and backward with dL/dh_K = mu times a fixed matrix."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 1, 3, 3, dtype=torch.float64, generator=generator)
    grad_logits = mu * torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=generator)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    x, h = [], []
    handles = []
    for linear in linears:
        handles.append(linear.register_forward_pre_hook(lambda module, args: x.append(args[0].detach().clone())))
        handles.append(linear.register_forward_hook(lambda module, args, out: h.append(out)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    weights = [linear.weight for linear in linears]
    grads = torch.autograd.grad((logits * grad_logits).sum(), [*h, *weights])
    return Pass([*x[1:], logits.detach()], list(grads[: len(h)]), list(grads[len(h) :]))


def error(value: Tensor, expected: Tensor) -> float:
    """Relative error in the largest entry; 0 for two zeros."""
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def test_the_mlp_is_the_one_the_theorems_speak_of():
    for norm in (False, True):
        model = build_mlp(5, 6, norm, seed=0)
        kinds = [type(m) for m in model.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d | nn.ReLU)]
        hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] if norm else [nn.Linear, nn.ReLU]
        assert kinds == hidden * 4 + [nn.Linear]
        assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear))


@settings(max_examples=30, deadline=None)
@given(layers=depths, width=widths, seed=seeds, mu=scales, data=st.data())
def test_theorem_1_without_normalization_scales_compound_over_layers(layers, width, seed, mu, data):
    a = data.draw(st.lists(scales, min_size=layers, max_size=layers))
    model = build_mlp(layers, width, norm=False, seed=seed)
    before = run(model, seed)
    after = run(init_weights(model, "scaled", factors=a), seed, mu)
    for k in range(layers):
        assert error(after.x[k], math.prod(a[: k + 1]) * before.x[k]) < 1e-9
        assert error(after.grad_h[k], mu * math.prod(a[k + 1 :]) * before.grad_h[k]) < 1e-9
        others = math.prod(a[:k]) * math.prod(a[k + 1 :])
        assert error(after.grad_weight[k], mu * others * before.grad_weight[k]) < 1e-9


@settings(max_examples=30, deadline=None)
@given(layers=depths, width=widths, seed=seeds, mu=scales, data=st.data())
def test_theorem_2_with_batchnorm_each_layer_keeps_its_scale_to_itself(layers, width, seed, mu, data):
    a = data.draw(st.lists(scales, min_size=layers - 1, max_size=layers - 1))
    model = build_mlp(layers, width, norm=True, seed=seed)
    before = run(model, seed)
    # the classifier has no BN after it: its own scale stays 1
    after = run(init_weights(model, "scaled", factors=[*a, 1.0]), seed, mu)
    for k in range(layers):
        assert error(after.x[k], before.x[k]) < 1e-6
        inverse = mu / a[k] if k < layers - 1 else mu
        assert error(after.grad_h[k], inverse * before.grad_h[k]) < 1e-6
        assert error(after.grad_weight[k], inverse * before.grad_weight[k]) < 1e-6


@pytest.mark.parametrize("layers", [3, 6])
def test_theorem_2_holds_to_first_order_in_eps(layers: int):
    errors = []
    for eps in (1e-4, 1e-5, 1e-6):
        model = build_mlp(layers, 8, norm=True, seed=0, eps=eps)
        before = run(model, 0)
        after = run(init_weights(model, "scaled", factors=[0.5] * (layers - 1) + [1.0]), 0)
        errors.append(error(after.grad_h[0], 2 * before.grad_h[0]))
    assert 0 < errors[0] < 0.1
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(10, rel=0.05)
