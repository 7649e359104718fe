"""Weight initializers by name, for any network.

A layer's weight is seen as one matrix a group, [out, fan_in]: a Linear's as it is, a convolution's with
fan_in = c_in/groups * kernel positions. fan_out = c_out/groups * kernel positions. Transposed convolutions
likewise, whatever their stride.
"""

import difflib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from condzoo.models.last_bn import check_module

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Factors = float | int | Sequence[float | int] | np.ndarray | Tensor
Groups = Float[Tensor, "groups out fan_in"]


@dataclass(frozen=True)
class Fans:
    """What a layer's scale depends on: terms a unit sums over, units an input reaches, whether it convolves."""

    fan_in: int
    fan_out: int
    conv: bool


Fill = Callable[[Groups, Fans, torch.Generator | None], object]


def random_(weight: Groups, fans: Fans, generator: torch.Generator | None = None) -> None:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): variance 1/(3 fan_in). LeCun et al. 1998; torch7's default."""
    bound = 1 / math.sqrt(fans.fan_in)
    weight.uniform_(-bound, bound, generator=generator)


def lecun_normal_(weight: Groups, fans: Fans, generator: torch.Generator | None = None) -> None:
    """N(0, 1/fan_in), not truncated. LeCun et al. 1998, Efficient BackProp, sec. 4.6."""
    weight.normal_(0.0, math.sqrt(1 / fans.fan_in), generator=generator)


def xavier_(weight: Groups, fans: Fans, generator: torch.Generator | None = None) -> None:
    """U(-b, b), b = sqrt(6/(fan_in + fan_out)): variance 2/(fan_in + fan_out). Glorot & Bengio 2010, eq. 16."""
    bound = math.sqrt(6 / (fans.fan_in + fans.fan_out))
    weight.uniform_(-bound, bound, generator=generator)


def he_(weight: Groups, fans: Fans, generator: torch.Generator | None = None) -> None:
    """N(0, 2/fan_in) for a linear layer, N(0, 2/fan_out) for a convolution. He et al. 2015, arXiv:1502.01852."""
    weight.normal_(0.0, math.sqrt(2 / (fans.fan_out if fans.conv else fans.fan_in)), generator=generator)


def orthogonal_(weight: Groups, fans: Fans, generator: torch.Generator | None = None) -> None:
    """Orthonormal rows (or columns, where there are more rows) of each group, Haar-distributed, gain 1.

    Saxe et al. 2014, arXiv:1312.6120.
    """
    for group in weight:
        nn.init.orthogonal_(group, generator=generator)


SCHEMES: dict[str, Fill | None] = {
    "random": random_,
    "lecun_normal": lecun_normal_,
    "xavier": xavier_,
    "he": he_,
    "orthogonal": orthogonal_,
    "scaled": None,  # a_k W_k with W_k as it is: Theorems 1 and 2 of arXiv:2002.10801
}


def init_weights(
    model: nn.Module,
    scheme: str,
    *,
    seed: SupportsIndex | None = None,
    factors: Factors | None = None,
) -> nn.Module:
    """Initialize every linear layer and convolution of `model`, in place.

    Biases become zero. Everything else (norm layers, embeddings, the packed projections of nn.MultiheadAttention)
    stays as it is.

    Args:
        model: any module; its parameters may lie on the meta device.
        scheme: a name of `SCHEMES`. `scaled` multiplies the weight of layer k, in `model.modules()` order, by
            factor k and leaves biases alone; "scaled:0.5" and "scaled:0.5,1,2" carry their factors with them.
        seed: None draws from torch's global generators; a whole number from generators of its own.
        factors: for `scaled` only: one for all layers, or one a layer; positive.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown scheme, factors that are missing, not allowed, not positive, or of another number
            than there are layers, a weight that is computed by a parametrization.
        TypeError: a model that is no module, a seed that is no whole number.
    """
    check_module(model)
    name, _, written = str(scheme).partition(":")
    if name not in SCHEMES:
        raise ValueError(unknown_scheme(name))
    layers = weighted_layers(model)
    fill = SCHEMES[name]
    if fill is None:
        scale_(layers, parse_factors(written, factors, len(layers)))
        return model
    if written or factors is not None:
        raise ValueError(f"factors are for init 'scaled' only, got them with {str(scheme)!r}")
    generators: dict[torch.device, torch.Generator] = {}
    for layer in layers:
        init_layer_(layer, fill, generator_on(layer.weight.device, seed, generators))
    zero_biases_(model)
    return model


def weighted_layers(model: nn.Module) -> list[Weighted]:
    """The linear layers and convolutions of `model` in `modules()` order, a shared weight once.

    Raises:
        ValueError: a layer's weight is not a parameter of its own (weight norm, spectral norm ...).
    """
    found: dict[int, Weighted] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Weighted):
            continue
        if "weight" not in module._parameters:
            raise ValueError(
                f"the weight of layer {name!r} is computed by a parametrization; initialize it before that"
            )
        found.setdefault(id(module.weight), module)
    return list(found.values())


def fans_of(layer: Weighted) -> Fans:
    """fan_in and fan_out of one group of `layer`."""
    if isinstance(layer, nn.Linear):
        return Fans(layer.in_features, layer.out_features, conv=False)
    positions = math.prod(layer.kernel_size)
    fan_in, fan_out = layer.in_channels * positions, layer.out_channels * positions
    return Fans(fan_in // layer.groups, fan_out // layer.groups, conv=True)


@torch.no_grad()
def init_layer_(layer: Weighted, fill: Fill, generator: torch.Generator | None = None) -> None:
    """Draw one layer's weight with a function of this module."""
    weight, fans = layer.weight, fans_of(layer)
    # nothing to draw; on the meta device that takes most of the time of building
    if weight.is_meta or weight.numel() == 0:
        return
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # orthogonalization exists from float32 on
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    shape = (groups, weight.numel() // (groups * fans.fan_in), fans.fan_in)
    drawn = torch.empty(shape, dtype=dtype, device=weight.device)
    fill(drawn, fans, generator)
    if isinstance(layer, TRANSPOSED):  # stored [c_in, c_out/groups, ...]
        c_in, c_out, *kernel = weight.shape
        drawn = drawn.reshape(groups, c_out, c_in // groups, *kernel).transpose(1, 2)
    weight.copy_(drawn.reshape(weight.shape))


@torch.no_grad()
def zero_biases_(model: nn.Module) -> None:
    """Zero every layer's bias: layers that share a weight may each have their own."""
    for layer in model.modules():
        if isinstance(layer, Weighted) and layer.bias is not None:
            layer.bias.zero_()


def generator_on(
    device: torch.device, seed: SupportsIndex | None, generators: dict[torch.device, torch.Generator]
) -> torch.Generator | None:
    """One seeded generator a device; None, torch's own, without a seed and where nothing is drawn (meta)."""
    if seed is None or device.type == "meta":
        return None
    if device not in generators:
        generators[device] = torch.Generator(device).manual_seed(operator.index(seed))  # also numpy's whole numbers
    return generators[device]


def parse_factors(written: str, factors: Factors | None, layers: int) -> list[float]:
    """One factor a layer, from "0.5,1,2" or from `factors`.

    Raises:
        ValueError: both or neither given, not numbers, not positive, or a wrong number of them.
    """
    if bool(written) == (factors is not None):
        raise ValueError("init 'scaled' needs factors, once: init_weights(..., factors=0.5) or 'scaled:0.5,1,2'")
    try:
        given: Any = [float(a) for a in written.split(",")] if written else factors
    except ValueError as error:
        raise ValueError(f"factors must be numbers with commas between, got {written!r}") from error
    given = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
    values = [float(a) for a in given] if isinstance(given, Sequence) else [float(given)]
    wrong = [a for a in values if not (math.isfinite(a) and a > 0)]
    if wrong:
        raise ValueError(f"factors must be positive and finite, got {wrong[0]}")
    if len(values) == 1:
        return values * layers
    if len(values) != layers:
        raise ValueError(f"factors must be one for all or one a layer ({layers}), got {len(values)}")
    return values


@torch.no_grad()
def scale_(layers: list[Weighted], factors: list[float]) -> None:
    """W_k -> a_k W_k."""
    for layer, factor in zip(layers, factors, strict=True):
        layer.weight.mul_(factor)


def unknown_scheme(name: str) -> str:
    """The error text for a scheme nobody has."""
    close = difflib.get_close_matches(name, SCHEMES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown init {name!r}; {hint}one of: {', '.join(SCHEMES)}"
