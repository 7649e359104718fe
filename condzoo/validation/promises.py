"""What a family of the zoo promises of its networks, a function a promise; `condzoo.validation` says which apply."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from condzoo.catalog import ModelInfo
from condzoo.probe import spectrum
from condzoo.validation.fingerprint import (
    AMPLIFICATION,
    IMAGES_KEY,
    STEP,
    TOLERANCE,
    difference,
    read_fingerprints,
    uniform,
)
from condzoo.validation.initial_conditioning import DOUBTFUL, Numbers, deviations, initial_records, measure_initial
from condzoo.validation.initial_vectors import misplaced
from condzoo.validation.initial_weights import weight_deviations
from condzoo.validation.subject import (
    OTHER_NORMS,
    Subject,
    prepare,
    recorded_inputs,
    size_of,
    small_input,
    weighted,
)

STANDARD_ERRORS = 5  # a seeded draw is compared with its distribution this widely
TINY_EPS = 1e-300  # BN's, where its scale invariance is checked: torch takes none at all for a mistake
# Weights are scaled by powers of two, which round nothing: a deep network without shortcuts amplifies round-off
# (cifar_vgg1202 by 1e70) until nothing of its logits is left.
FACTORS = (2.0, 4.0)  # exact, and no two layers' cancel: what lies between them would not be seen
NORM_FACTOR = 16.0  # of gammas and betas: far enough for activations that are a ReLU near 0 alone
FARTHEST = 2.0**300  # of their product, which a thousand layers would take out of float64's range
# Without BN, the factor of the inputs' root mean square a layer (a block of a ResNet). He's initializer keeps it at 1
# but for what zero padding takes off small images, a residual block adds its branch, and U(+-1/sqrt(fan_in)) leaves
# sqrt(1/6) = 0.41. The bounds hold every depth of a family with room for the draw. Of an MLP's the logarithm varies by
# 0.55 to 0.95 over the root of width times layers, so that these move by `MLP_ROOM` over that root; more below, where
# units die.
GROWTH = {"cifar_vgg": (0.6, 1.1), "cifar_resnet": (0.8, 1.5), "mlp": (0.3, 0.6)}
MLP_ROOM = (2.5, 1.5)
NARROWEST = 16  # units; of narrower MLPs whole layers may die, and a draw says nothing of the initializer
SCALE_TOLERANCE = 1e-7  # relative, float64
# the first of those that are drawn where a number's spread is in doubt; torch's generators take 32 bits of a seed
FURTHER_SEED = 2**31
FURTHER_LAYERS = 320  # in all of them: small networks differ more between seeds, and are soon measured


@dataclass(frozen=True)
class Check:
    """One promise: whether it held, and the numbers."""

    name: str
    ok: bool
    detail: str
    skipped: bool = False  # it could not be checked, which breaks no promise; `detail` says why


def unrecorded(name: str, subject: Subject) -> Check:
    """A check against a record, of a network built with other arguments than the recorded one."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in subject.changed.items())
    return Check(name, True, f"the record is of the network without {arguments}", skipped=True)


def check_size(subject: Subject) -> Check:
    """Parameters and multiply-adds are those recorded."""
    info = subject.info
    params, macs = size_of(subject.model, info.input_size)
    ok = (params, macs) == (info.params, info.macs)
    of = f" with {', '.join(subject.changed)} as here" if subject.changed else ""
    return Check("size", ok, f"{params:,} parameters of {info.params:,}, {macs:,} multiply-adds of {info.macs:,}{of}")


def check_initialization(subject: Subject) -> Check:
    """Each weight has its initializer's variance, mean and shape, within the standard error of so many draws.

    Norms' gammas and betas, and biases, are where the initializer puts them.
    """
    worst, where = 0.0, "variance"
    for name, layer in weighted(subject.model):
        for what, deviation in weight_deviations(layer).items():
            if not deviation <= worst:  # also of NaN
                worst, where = math.inf if math.isnan(deviation) else deviation, f"{what} of {name}"
    detail = f"worst: {where} is {worst:.1f} standard errors off"
    if vectors := misplaced(subject):
        detail += f"; no initial values: {', '.join(vectors[:3])}"
    return Check("weights", worst < STANDARD_ERRORS and not vectors, detail)


def check_evaluation(subject: Subject) -> Check:
    """In eval mode, by the running statistics as they are, the logits are finite; so is every buffer.

    With each batch's own statistics in their place the logits are those of train mode.
    """
    bad = [n for n, b in subject.model.named_buffers() if not bool(torch.isfinite(b).all())]
    model, training = (copy.deepcopy(subject.model) for _ in range(2))
    with torch.no_grad():
        finite = bool(torch.isfinite(model.eval()(subject.x)).all())
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(take_statistics)
        expected = training(subject.x)
        apart, scale = float((model(subject.x) - expected).abs().max()), float(expected.abs().max())
        same = apart <= TOLERANCE * scale
        if not same and finite:  # or round-off, of a network that amplifies it so much
            moved = training(subject.x + STEP * uniform(subject.x.shape, IMAGES_KEY))
            same = float((moved - expected).abs().max()) > AMPLIFICATION * STEP * scale
    detail = f"logits are {'finite' if finite else 'not finite'}"
    detail += f"; not finite: {', '.join(bad[:3])}" if bad else ""
    detail += "" if same or not finite else f"; by a batch's statistics {apart / scale:.1g} from train mode's, relative"
    return Check("eval mode", finite and same and not bad, detail)


@torch.no_grad()
def take_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before a BatchNorm in eval mode: its running statistics are those of what it is called with."""
    assert isinstance(norm, _BatchNorm)
    x = args[0].transpose(0, 1).flatten(1)  # [C, B * H * W]
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.copy_(x.mean(1))
        norm.running_var.copy_(x.var(1, correction=0))


def check_signals(subject: Subject) -> Check:
    """The root mean square of the layers' inputs stays, or grows, or shrinks, as the family's initializer says."""
    rms = input_magnitudes(subject)
    info = subject.info
    if len(rms) < (1 if info.norm == "bn" else 2):
        return Check("signals", True, "so few layers have no hidden ones to compare", skipped=True)
    if info.norm == "bn":
        low, high = min(rms), max(rms)
        bound = 3 * math.sqrt(1 + info.depth / 2)  # a residual stream adds up to depth/2 normalized branches
        ok = low > 0.05 and high < bound
        return Check("signals", ok, f"inputs between {low:.2g} and {high:.2g}, bounds 0.05 and {bound:.2g}")
    steps = (info.depth - 2) // 2 if info.family == "cifar_resnet" else len(rms) - 1
    factor = (rms[-1] / rms[0]) ** (1 / steps) if rms[0] > 0 else math.nan
    low, high = GROWTH[info.family]
    if info.family == "mlp":
        if subject.model.num_features < NARROWEST:
            return Check("signals", True, f"layers of fewer than {NARROWEST} units are the draw's", skipped=True)
        root = math.sqrt(subject.model.num_features * steps)
        low, high = low * math.exp(-MLP_ROOM[0] / root), high * math.exp(MLP_ROOM[1] / root)
    unit = "block" if info.family == "cifar_resnet" else "layer"
    return Check("signals", low < factor < high, f"times {factor:.3g} a {unit}, bounds {low:.2g} and {high:.2g}")


def input_magnitudes(subject: Subject) -> list[float]:
    """Root mean square of the input of each weighted layer after the first, in forward order, but for the head's."""
    layers = [layer for name, layer in weighted(subject.model) if name != "fc"]
    with recorded_inputs(layers) as inputs, torch.no_grad():
        copy_buffers = {n: b.clone() for n, b in subject.model.named_buffers()}
        subject.model(subject.x)
        subject.model.load_state_dict(copy_buffers, strict=False)
    return [float(x.square().mean().sqrt()) for x in inputs[1:]]


def check_scaling(subject: Subject) -> Check:
    """With BN the logits do not see the scale of the weights before it; without, they follow it (Theorem 1).

    Of all gammas and betas together they follow the scale: every BN's is cancelled by the next.
    """
    if other := [key for key in OTHER_NORMS if key in subject.changed]:
        return Check("scaling", True, f"with {', '.join(other)} there may be weights that no BN follows", skipped=True)
    model = copy.deepcopy(subject.model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = TINY_EPS
    before = model(subject.x).detach()
    factors = torch.Generator().manual_seed(1)
    expected = 1.0
    scaled = scaled_layers(subject.info, model)
    for layer in scaled:
        a = FACTORS[int(torch.randint(len(FACTORS), (), generator=factors))]
        a = a if expected < FARTHEST else 1 / a
        layer.weight.data.mul_(a)
        expected *= a
        if layer.bias is not None:  # a bias is of its layer's output, which every factor up to here has reached
            layer.bias.data.mul_(expected)
    if subject.info.norm == "bn" or (subject.info.last_bn and not subject.maps):
        expected = NORM_FACTOR
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.weight.data.mul_(expected)
            norm.bias.data.mul_(expected)
    if getattr(model.get_classifier(), "bias", None) is not None:
        model.get_classifier().bias.data.mul_(expected)
    after = model(subject.x).detach()
    error = float((after - expected * before).norm() / (abs(expected) * before.norm()))
    what = f"{len(scaled)} weights" + (", and BN's gammas and betas" if expected == NORM_FACTOR else "")
    detail = f"{what} scaled, logits times {expected:.3g} but for {error:.1g}, relative"
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

    For gamma = 1 and beta = 0 every feature's mean square is 1 (0 for a feature that is constant), so the trace is
    at most d; in general it is at most the sum of gamma^2 + beta^2. What the last BN itself sees is the plain
    twin's classifier input.
    """
    if subject.maps:
        return Check("last BN", True, "it normalizes pooled features; unpooled maps pass it by", skipped=True)
    bn = subject.model.last_bn
    with recorded_inputs([bn, subject.model.get_classifier()]) as inputs, torch.no_grad():
        buffers = {n: b.clone() for n, b in subject.model.named_buffers()}
        subject.model(subject.x)
        subject.model.load_state_dict(buffers, strict=False)
    if len(inputs) < 2:
        return Check("last BN", False, "it is not called")
    plain, x = inputs
    gamma, beta = bn.weight.detach(), bn.bias.detach()
    bound = float((gamma.square() + beta.square()).sum())
    excess = float((x.square().mean(0) - gamma.square() - beta.square()).max())
    lambda_max, twins = (spectrum(h.T @ h / len(h)).lambda_max for h in (x, plain))
    mean = float((x.mean(0) - beta).abs().max())
    ok = x.shape == plain.shape and excess < 1e-6 and mean < 1e-6 and lambda_max <= bound * (1 + 1e-9)
    return Check(
        "last BN",
        ok,
        f"lambda_max of the classifier's input {lambda_max:.3g} of at most {bound:.4g}, without it {twins:.3g}; "
        f"mean {mean:.1g}",
    )


def check_conditioning(subject: Subject) -> Check:
    """lambda_max and kappa of inputs and output gradients are the record's, as far as seeds differ."""
    if subject.changed:
        return unrecorded("conditioning", subject)
    record = initial_records()[subject.info.name]
    numbers = measure_initial(subject.model, subject.x, subject.y)
    found = deviations(numbers, record)
    if 1 < found[0].excess <= DOUBTFUL:
        found = deviations(numbers, record.widened(further_seeds(subject.info)))
    worst = found[0]
    return Check(
        "conditioning",
        worst.excess <= 1,
        f"worst of {len(found)}: {worst.what} {worst.measured:.3g}, recorded {worst.recorded:.3g}, "
        f"up to {worst.allowed:.3g} times allowed",
    )


def further_seeds(info: ModelInfo) -> list[Numbers]:
    """The numbers of sound networks of that name, of seeds that are not the record's."""
    subjects = (prepare(info.name, FURTHER_SEED + i) for i in range(max(8, FURTHER_LAYERS // info.depth)))
    return [measure_initial(subject.model, subject.x, subject.y) for subject in subjects]


def check_function(subject: Subject) -> Check:
    """The network computes what the model's code did when it was recorded, weights aside."""
    if subject.changed.keys() - {"last_bn_init", "zero_init_last"}:  # they are weights
        return unrecorded("function", subject)
    recorded = read_fingerprints()[subject.info.name]
    if recorded is None:
        reason = "no record: this depth amplifies round-off to the size of the logits"
        return Check("function", True, reason, skipped=True)
    error = difference(subject.model, small_input(subject.info), recorded)
    return Check("function", error < TOLERANCE, f"logits with fixed weights as recorded but for {error:.1g}, relative")
