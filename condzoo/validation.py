"""Holding a network of the zoo against what its family promises (`condzoo validate`).

Every check runs in float64 on seeded random images, so that what it sees is the network and not round-off, and
so that the deepest networks without BatchNorm, whose signals leave float32's range, are seen too.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from condzoo.catalog import ModelInfo, list_models, model_info
from condzoo.models import create_model
from condzoo.probe import spectrum

STANDARD_ERRORS = 5  # a seeded draw is compared with its distribution this widely
TINY_EPS = 1e-30  # BN's, where its scale invariance is checked: torch takes none at all for a mistake
# Without BN, the factor of the inputs' root mean square a layer (a block of a ResNet). He's initializer keeps it at 1
# but for what zero padding takes off small images, a residual block adds its branch, and U(+-1/sqrt(fan_in)) leaves
# sqrt(1/6) = 0.41. The bounds hold every depth of a family with room for the draw.
GROWTH = {"cifar_vgg": (0.6, 1.1), "cifar_resnet": (0.8, 1.5), "mlp": (0.3, 0.6)}
SCALE_TOLERANCE = 1e-7  # relative, float64


@dataclass(frozen=True)
class Check:
    """One promise: whether it held, and the numbers."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Validation:
    """What became of every promise of one model."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return all(check.ok for check in self.checks)

    def table(self) -> str:
        """One line a check."""
        return "\n".join(f"{self.model:32} {'ok  ' if c.ok else 'FAIL'}  {c.name:12} {c.detail}" for c in self.checks)


@dataclass(frozen=True)
class Subject:
    """A network under validation, in float64 and train mode, with its images and labels."""

    info: ModelInfo
    model: Any
    x: Tensor
    y: Tensor


def validate(name_or_model: str | nn.Module, *, seed: int = 0) -> Validation:
    """Build a model of the zoo and check what its family promises; a model given as such is left as it is.

    Checks: recorded parameters and multiply-adds; initial weights; finite forward and backward; signal
    magnitudes over depth; scale invariance (BN) or homogeneity (Theorem 1); the last BN's bound.

    Args:
        name_or_model: a registered name, or a network of the zoo at its initialization.
        seed: of the initialization, where it is built here, and of the images.

    Raises:
        ValueError: an unknown name, or a network that is not of the zoo (it has no promises to hold).
    """
    subject = prepare(name_or_model, seed)
    checks = [
        check_size(subject),
        check_initialization(subject),
        check_finite(subject),
        check_signals(subject),
        check_scaling(subject),
    ]
    if subject.info.last_bn:
        checks.append(check_last_bn(subject))
    return Validation(subject.info.name, tuple(checks))


def prepare(name_or_model: str | nn.Module, seed: int) -> Subject:
    """The network as a float64 copy in train mode, and a batch small enough for its depth."""
    if isinstance(name_or_model, str):
        info = model_info(name_or_model)
        torch.manual_seed(seed)
        model = create_model(info.name)
    else:
        model = copy.deepcopy(name_or_model)
        arch = getattr(model, "pretrained_cfg", {}).get("architecture")
        if arch not in list_models():
            raise ValueError(
                f"{type(model).__name__} is not a network of the zoo; validate takes a name or one of those"
            )
        info = model_info(arch)
    channels, height, width = info.input_size
    # Convolutional networks keep their promises at any size, and float64 convolutions are slow: the smallest
    # images that leave a position after the last stride.
    if info.family != "mlp":
        height = width = 8 if info.family in ("cifar_resnet", "cifar_preresnet", "cifar_vgg") else 32
    size = (channels, height, width)
    batch = 64 if info.family == "mlp" else 16 if info.depth <= 110 else 8
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *size, generator=generator, dtype=torch.float64)
    y = torch.randint(info.num_classes, (batch,), generator=generator)
    return Subject(info, model.double().train(), x, y)


def check_size(subject: Subject) -> Check:
    """Parameters and multiply-adds are those recorded."""
    info = subject.info
    params = sum(p.numel() for p in subject.model.parameters())
    on_meta = copy.deepcopy(subject.model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, *info.input_size, device="meta", dtype=torch.float64))
    macs = counter.get_total_flops() // 2
    ok = (params, macs) == (info.params, info.macs)
    return Check("size", ok, f"{params:,} parameters of {info.params:,}, {macs:,} multiply-adds of {info.macs:,}")


def check_initialization(subject: Subject) -> Check:
    """Each weight's mean square is its initializer's variance, within the standard error of so many draws."""
    worst, where = 0.0, ""
    for name, layer in weighted(subject.model):
        variance, kurtosis = expected_variance(subject.info, name, layer)
        square = float(layer.weight.detach().square().mean())
        deviation = abs(square / variance - 1) / math.sqrt((kurtosis - 1) / layer.weight.numel())
        if deviation > worst:
            worst, where = deviation, name
    return Check("weights", worst < STANDARD_ERRORS, f"worst variance is {worst:.1f} standard errors off, in {where}")


def expected_variance(info: ModelInfo, name: str, layer: nn.Module) -> tuple[float, float]:
    """Variance and kurtosis of a layer's initializer: He-normal convolutions, uniform linear layers."""
    if isinstance(layer, nn.Conv2d):
        return 2 / (layer.out_channels // layer.groups * math.prod(layer.kernel_size)), 3.0
    assert isinstance(layer, nn.Linear)
    return 1 / (3 * layer.in_features), 1.8


def check_finite(subject: Subject) -> Check:
    """Loss finite; every parameter gets a finite gradient that is not all zero (but for biases before a BN)."""
    model = copy.deepcopy(subject.model)
    loss = nn.functional.cross_entropy(model(subject.x), subject.y)
    loss.backward()
    loss = loss.detach()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    ok = bool(torch.isfinite(loss)) and not bad
    return Check(
        "finite", ok, f"loss {float(loss):.3g}" + (f"; no finite gradient in {', '.join(bad[:3])}" if bad else "")
    )


def check_signals(subject: Subject) -> Check:
    """The root mean square of the layers' inputs stays, or grows, or shrinks, as the family's initializer says."""
    rms = input_magnitudes(subject)
    info = subject.info
    if info.norm == "bn":
        low, high = min(rms), max(rms)
        bound = 3 * math.sqrt(1 + info.depth / 2)  # a residual stream adds up to depth/2 normalized branches
        ok = low > 0.05 and high < bound
        return Check("signals", ok, f"inputs between {low:.2g} and {high:.2g}, bounds 0.05 and {bound:.2g}")
    steps = (info.depth - 2) // 2 if info.family == "cifar_resnet" else len(rms) - 1
    factor = (rms[-1] / rms[0]) ** (1 / steps)
    low, high = GROWTH[info.family]
    unit = "block" if info.family == "cifar_resnet" else "layer"
    return Check("signals", low < factor < high, f"times {factor:.3g} a {unit}, bounds {low:g} and {high:g}")


def input_magnitudes(subject: Subject) -> list[float]:
    """Root mean square of the input of each weighted layer after the first, in forward order, but for the head's."""
    layers = [layer for name, layer in weighted(subject.model) if name != "fc"]
    with recorded_inputs(layers) as inputs, torch.no_grad():
        copy_buffers = {n: b.clone() for n, b in subject.model.named_buffers()}
        subject.model(subject.x)
        subject.model.load_state_dict(copy_buffers, strict=False)
    return [float(x.square().mean().sqrt()) for x in inputs[1:]]


def check_scaling(subject: Subject) -> Check:
    """With BN the logits do not see the scale of the weights before it; without, they follow it (Theorem 1)."""
    model = copy.deepcopy(subject.model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = TINY_EPS
    before = model(subject.x).detach()
    factors = torch.Generator().manual_seed(1)
    expected = 1.0
    scaled = scaled_layers(subject.info, model)
    for layer in scaled:
        a = 0.5 + float(torch.rand((), generator=factors))
        layer.weight.data.mul_(a)
        expected *= a
    if subject.info.norm == "bn" or subject.info.last_bn:
        expected = 1.0
    after = model(subject.x).detach()
    error = float((after - expected * before).norm() / (abs(expected) * before.norm()))
    what = "unchanged" if expected == 1.0 else f"times {expected:.3g}"
    detail = f"{len(scaled)} weights scaled, logits {what} but for {error:.1g}, relative"
    return Check("scaling", error < SCALE_TOLERANCE, detail)


def scaled_layers(info: ModelInfo, model: nn.Module) -> list[Any]:
    """The layers whose scale a BN cancels; without BN, those the whole signal runs through."""
    body = [(name, layer) for name, layer in weighted(model) if name != "fc"]
    if "preresnet" in info.family:  # a branch's last convolution is added, not normalized
        last = "conv3" if info.depth >= 50 and info.family == "imagenet_preresnet" else "conv2"
        return [m for name, m in body if ".conv" in name and not name.endswith(last) and name != "conv1"]
    if info.norm == "none" and info.family == "cifar_resnet":
        return [m for name, m in body if name == "conv1"]
    return [m for _, m in body]


def check_last_bn(subject: Subject) -> Check:
    """The classifier sees standardized features, so lambda_max of its input is at most their number d.

    For gamma = 1 every feature's mean square is 1 (0 for a feature that is constant), so the trace is at most d.
    """
    with recorded_inputs([subject.model.get_classifier()]) as inputs, torch.no_grad():
        buffers = {n: b.clone() for n, b in subject.model.named_buffers()}
        subject.model(subject.x)
        subject.model.load_state_dict(buffers, strict=False)
    x = inputs[0]
    d = x.shape[1]
    gamma = subject.model.last_bn.weight.detach()
    excess = float((x.square().mean(0) - gamma.square()).max())
    lambda_max = spectrum(x.T @ x / len(x)).lambda_max
    mean = float(x.mean(0).abs().max())
    ok = excess < 1e-6 and mean < 1e-6 and lambda_max <= d * float(gamma.square().max()) * (1 + 1e-9)
    return Check(
        "last BN", ok, f"lambda_max of the classifier's input {lambda_max:.3g} of at most {d}; mean {mean:.1g}"
    )


def weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear layers by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))


@contextmanager
def recorded_inputs(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The inputs of `layers` in the order of the forward pass that runs inside."""
    inputs: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone())) for m in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
