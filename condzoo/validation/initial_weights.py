"""Whether weights are drawn from the distribution that the zoo draws them from."""

import math

from torch import nn


def weight_deviations(layer: nn.Conv2d | nn.Linear) -> dict[str, float]:
    """How many standard errors a weight is from its initializer: He-normal convolutions, uniform linear layers.

    Shape: mean |w| over the root mean square, which tells a normal distribution from a uniform one in 300 weights.
    """
    if isinstance(layer, nn.Conv2d):
        variance = 2 / (layer.out_channels * math.prod(layer.kernel_size))  # torch's fan-out: of all groups
        kurtosis, shape, spread = 3.0, math.sqrt(2 / math.pi), math.sqrt(1 - 3 / math.pi)
    else:
        variance = 1 / (3 * layer.in_features)
        kurtosis, shape, spread = 1.8, math.sqrt(3) / 2, math.sqrt(1 / 40)
    weight = layer.weight.detach()
    square, mean, size = (float(values.mean()) for values in (weight.square(), weight, weight.abs()))
    root = math.sqrt(weight.numel())
    return {
        "variance": root * abs(square / variance - 1) / math.sqrt(kurtosis - 1),
        "mean": root * abs(mean) / math.sqrt(variance),
        "shape": root * abs(size / math.sqrt(square) - shape) / spread if square else math.nan,
    }
