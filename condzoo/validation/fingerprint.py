"""What a model of the zoo computes with weights and images that are the same everywhere: a fingerprint of its code.

The weights come from a counter-based generator's raw bits, so that no library's way of drawing numbers enters. The
logits show any change of the function: a shortcut that pads elsewhere, a BatchNorm on the other side of a fork.
models/fingerprints.json has those of every registered model; `python -m condzoo.validation.record_zoo` makes it again.
Shapes: B images, C channels, H x W pixels, K classes.
"""

import copy
import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RECORD = Path(__file__).parents[1] / "models" / "fingerprints.json"
IMAGES = 8
LOGITS = 4  # of the first image; in train mode they depend on the whole batch
TOLERANCE = 1e-5  # of the largest logit
IMAGES_KEY = 2**32  # of the generator; parameters have their own number as key
STEP = 1e-12  # change of the images, of variance 1, that shows how a network amplifies round-off
AMPLIFICATION = 1e8  # beyond it float64's round-off (1e-16, in each of many layers) would come near the tolerance


def uniform(shape: torch.Size | tuple[int, ...], key: int) -> Tensor:
    """Float64 numbers of mean 0 and variance 1, the same everywhere for one key: Philox's bits, scaled."""
    bits = np.random.Philox(key=key).random_raw(math.prod(shape))
    values = (bits >> np.uint64(11)).astype(np.float64) * (2 * 3**0.5 / 2**53) - 3**0.5
    return torch.from_numpy(values).reshape(shape)


@torch.no_grad()
def fill_(model: nn.Module) -> None:
    """Give a network the fixed weights: He's scale for layers, around one for BatchNorm's gammas, 0.1 for biases."""
    for key, parameter in enumerate(model.parameters()):
        values = uniform(parameter.shape, key)
        if parameter.ndim > 1:
            values *= math.sqrt(2 / math.prod(parameter.shape[1:]))
        else:
            values *= 0.1
        parameter.copy_(values)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.add_(1)


@torch.no_grad()
def logits(model: nn.Module, input_size: tuple[int, int, int], step: float = 0.0) -> Tensor:  # [B, K]
    """Logits of a copy with the fixed weights, in float64 and train mode, on the fixed images, moved by `step`."""
    model = copy.deepcopy(model).double().train()
    fill_(model)
    shape = (IMAGES, *input_size)
    return model(uniform(shape, IMAGES_KEY) + step * uniform(shape, IMAGES_KEY + 1))


def fingerprint(model: nn.Module, input_size: tuple[int, int, int]) -> list[float] | None:
    """The first logits of the first image, as parts of the largest of all, and that one; None: round-off would show."""
    found, moved = (logits(model, input_size, step) for step in (0.0, STEP))
    scale = float(found.abs().max())
    if not float((found - moved).abs().max()) <= AMPLIFICATION * STEP * scale:
        return None
    return [*(found[0, :LOGITS] / scale).tolist(), scale]


def difference(model: nn.Module, input_size: tuple[int, int, int], recorded: list[float]) -> float:
    """How far a network's first logits are from the record's, as a part of the record's largest of all."""
    *expected, scale = recorded
    first = (logits(model, input_size)[0, : len(expected)] / scale).tolist()
    return max(abs(a - b) for a, b in zip(first, expected, strict=True))


@functools.cache
def read_fingerprints() -> dict[str, list[float] | None]:
    """Model -> its fingerprint; None for the few that amplify round-off too much to have one."""
    return json.loads(RECORD.read_text(encoding="utf-8"))
