"""The theorems as measurements: random networks, scaled, seen through the probe alone.

Layers k = 1 ... K with inputs x_{k-1} and outputs h_k; factors a_k > 0 scale the weights, mu scales dL/dh_K.
"""

import copy
import math
import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condzoo.experiments.schema import TheorySettings
from condzoo.experiments.stopping import stopping
from condzoo.models import create_model, init_weights
from condzoo.probe import Conditioning, kronecker_report, measure
from condzoo.training.events import Message, OnEvent

BATCH, CLASSES, PIXELS = 64, 5, 4
TINY_EPS = 1e-20  # BN's; Theorem 2 is exact for 0
SMALL_EPS = (1e-8, 1e-9)  # where its error should be proportional to eps: at 1e-4 a ReLU unit may change its sign


@dataclass(frozen=True)
class Trial:
    """One random network's size, factors and data."""

    model: nn.Module
    factors: list[float]
    mu: float
    x: Tensor
    grad_logits: Tensor


def collect_theory(settings: TheorySettings, seeds: list[int], on_event: OnEvent | None = None) -> dict[str, Any]:
    """One row a trial: the largest relative error of each quantity that the statement speaks of, None if not finite.

    Raises:
        Stopped: on a signal.
    """
    began = time.perf_counter()
    rows = []
    with torch.random.fork_rng(devices=[]), stopping("trials") as stop_where_asked:
        for number, seed in enumerate(seeds, start=1):
            if on_event is not None:
                on_event(Message(f"[{number}/{len(seeds)}] {settings.statement}, seed {seed}"))
            for trial in range(settings.trials):
                stop_where_asked()
                generator = torch.Generator().manual_seed(1_000_003 * seed + trial)
                errors = {key: finite(value) for key, value in STATEMENTS[settings.statement](generator).items()}
                rows.append({"seed": seed, "trial": trial, "errors": errors})
    return {"trials": rows, "seconds": time.perf_counter() - began}


def theorem_1(generator: torch.Generator) -> dict[str, float]:
    """No normalization: inputs grow by the factors before them, gradients by those after them."""
    trial = draw_trial(generator, norm=False)
    factors, mu = trial.factors, trial.mu
    layers = range(len(factors))
    before = [math.prod(factors[:k]) for k in layers]
    after = [mu * math.prod(factors[k + 1 :]) for k in layers]
    weight = [mu * math.prod(factors) / factors[k] for k in layers]
    return compare(trial, before, after, weight)


def theorem_2(generator: torch.Generator) -> dict[str, float]:
    """BN after each linear layer but the last: inputs stay, gradients shrink by the layer's own factor.

    Exact for BN's eps = 0; `eps_exponent` is the power of eps with which the largest error grows otherwise.
    """
    trial = draw_trial(generator, norm=True)
    larger, smaller = (largest(errors_at(trial, eps).values()) for eps in SMALL_EPS)
    exponent = math.log(larger / smaller) / math.log(SMALL_EPS[0] / SMALL_EPS[1])
    return errors_at(trial, TINY_EPS) | {"eps_exponent": exponent}


def errors_at(trial: Trial, eps: float) -> dict[str, float]:
    """Theorem 2's relative errors in a copy of the trial's network with another eps in its BN."""
    model = copy.deepcopy(trial.model)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm1d):
            bn.eps = eps
    own = [1 / a for a in trial.factors]
    return compare(replace(trial, model=model), [1.0] * len(own), own, own)


def proposition_1(generator: torch.Generator) -> dict[str, float]:
    """The spectrum of Sigma_x (x) Sigma_grad_h is all products; and how near the exact layer block is to it.

    The probe's products of two spectra are held against the matrix itself, formed of the two moments.
    """
    trial = draw_trial(generator, norm=False)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    measured = measure(trial.model, (trial.x, y), labels="model", precision="float64", bias=True)
    check_all_measured(trial, measured)
    found: dict[str, list[float]] = {"lambda_max": [], "kappa": [], "spectrum": []}
    formed = dense_spectra(trial.model, trial.x)
    for name, layer in measured.items():
        dense = formed[name]
        top = float(dense[0])
        known = dense[dense > 1e-9 * top]
        p = len(known) / len(dense)
        kappa = layer.fisher.condition_number(p)
        found["lambda_max"].append(abs(layer.fisher.lambda_max / top - 1))
        found["kappa"].append(abs(kappa * float(known[-1]) / top - 1))
        found["spectrum"].append(float((layer.fisher.eigenvalues - dense).abs().max()) / top)
    blocks = kronecker_report(trial.model, trial.x)
    check_all_measured(trial, blocks)
    ratios = [layer.lambda_ratio for layer in blocks.values()]
    errors = {key: largest(values) for key, values in found.items()}
    return errors | {"nearest": float(np.min(ratios)), "farthest": largest(ratios)}


STATEMENTS = {"theorem_1": theorem_1, "theorem_2": theorem_2, "proposition_1": proposition_1}


def dense_spectra(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Eigenvalues, descending, of every linear layer's Sigma_x (x) Sigma_grad_h formed as a matrix, without the probe.

    Labels are the model's: each sample's gradient is taken for every class, weighted by its probability. Samples must
    not depend on each other (no BN).
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, _: nn.Module, inputs: tuple[Tensor], h: Tensor) -> Tensor:
        seen[name] = (inputs[0], h)
        return h.clone()  # for the ReLU that works in place

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(see, name)) for name, module in layers]
    logs = model(x).log_softmax(1)
    for handle in handles:
        handle.remove()
    outputs = [h for _, h in seen.values()]
    grads = [torch.autograd.grad(-log.sum(), outputs, retain_graph=True) for log in logs.unbind(1)]  # classes x layers
    spectra = {}
    for k, (name, (inputs, _)) in enumerate(seen.items()):
        weighted = [(log.exp()[:, None] * grad[k]).T @ grad[k] for log, grad in zip(logs.unbind(1), grads, strict=True)]
        product = torch.kron(inputs.T @ inputs, torch.stack(weighted).sum(0)) / len(x) ** 2
        spectra[name] = torch.linalg.eigvalsh(product.detach()).flip(0)
    return spectra


def draw_trial(generator: torch.Generator, norm: bool) -> Trial:
    """A network of 3 to 7 linear layers and 8 to 24 units, factors between 1/3 and 3, float64, no biases."""
    layers, width, seed = (int(torch.randint(*bounds, (1,), generator=generator)) for bounds in SIZES)
    torch.manual_seed(seed)
    name = f"mlp{layers}x{width}" + ("_bn" if norm else "")
    model = create_model(name, bias=False, input_size=(1, PIXELS, PIXELS), num_classes=CLASSES, init="he")
    drawn = (torch.rand(layers, generator=generator, dtype=torch.float64) * 2 - 1) * math.log(3)
    factors = drawn.exp().tolist()
    if norm:
        factors[-1] = 1.0  # no BN follows the classifier; the theorem speaks of the layers that one follows
    x = torch.randn(BATCH, 1, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    grad_logits = torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    mu = 1.0 if norm else math.exp(float(torch.rand(1, generator=generator)) * 2 - 1)
    return Trial(model.double().train(), factors, mu, x, grad_logits)


SIZES = ((3, 8), (8, 25), (0, 2**31))


def compare(trial: Trial, inputs: list[float], grads: list[float], weights: list[float]) -> dict[str, float]:
    """Relative errors of sqrt(lambda_max) and of sigma_max(dL/dW), scaled network against plain one, the largest."""
    plain = measured_with(trial, 1.0)
    scaled_model = init_weights(trial.model, "scaled", factors=trial.factors)
    scaled = measured_with(Trial(scaled_model, trial.factors, trial.mu, trial.x, trial.grad_logits), trial.mu)
    check_all_measured(trial, plain)
    found: dict[str, list[float]] = {"input": [], "output_grad": [], "weight_grad": []}
    for k, name in enumerate(plain):
        a, b = plain[name], scaled[name]
        assert a.weight_grad is not None
        assert b.weight_grad is not None
        ratios = {
            "input": math.sqrt(b.input.lambda_max / a.input.lambda_max) / inputs[k],
            "output_grad": math.sqrt(b.output_grad.lambda_max / a.output_grad.lambda_max) / grads[k],
            "weight_grad": b.weight_grad / a.weight_grad / weights[k],
        }
        for key, ratio in ratios.items():
            found[key].append(abs(ratio - 1))
    return {key: largest(values) for key, values in found.items()}


def check_all_measured(trial: Trial, measured: Sized) -> None:
    """A statement is about all linear layers.

    Raises:
        RuntimeError: the probe left some out.
    """
    if len(measured) != len(trial.factors):
        raise RuntimeError(f"{len(measured)} of the network's {len(trial.factors)} linear layers were measured")


def largest(values: Iterable[float]) -> float:
    """The largest; NaN where one is, which `max` would hide."""
    return float(np.max(list(values)))


def finite(value: float) -> float | None:
    """A value as it is kept: None where it is not finite."""
    return value if math.isfinite(value) else None


def measured_with(trial: Trial, mu: float) -> Conditioning:
    """The probe's measurement under a loss whose gradient in the logits is mu times a fixed matrix."""
    return measure(
        trial.model,
        (trial.x, trial.grad_logits),
        loss=lambda logits, target: mu * (logits * target).sum() / len(target),
        precision="float64",
    )
