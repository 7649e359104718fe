"""Where an initializer puts what is no matrix: gammas and betas of norms, and biases; and how BatchNorms are set."""

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from condzoo.catalog import read_catalog
from condzoo.validation.subject import OTHER_NORMS, Subject

SETTINGS = {"momentum": 0.1, "eps": 1e-5, "track_running_stats": True}  # of every BatchNorm: torch's own
ROUNDING = 1.01  # bounds are exceeded by so much in weights of few digits


def misplaced(subject: Subject) -> list[str]:
    """Names of the gammas that are not 1, and of the betas and biases that are not 0, where they are to be.

    Also of BatchNorms' settings that are not torch's, unless an argument chose the norms.
    The last BN's gamma may be drawn from U(0, 1), and that of a block's last norm be 0, if the network was built so.
    timm draws biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): those of its own networks, and in blocks of a user's.
    """
    timms = subject.info.name in read_catalog()[1]
    drawn = timms or "block_args" in subject.changed
    gammas = {"last_bn": (0.0, 1.0)} if "last_bn_init" in subject.changed else {}
    if "zero_init_last" in subject.changed:
        gammas |= dict.fromkeys(last_norms(subject.model), (0.0, 0.0))
    elif timms:
        gammas |= dict.fromkeys(last_norms(subject.model), (0.0, 1.0))  # which timm does unless told not to
    found = []
    for name, module in subject.model.named_modules():
        ranges: dict[str, tuple[float, float]] = {}
        if isinstance(module, _BatchNorm | nn.GroupNorm):
            ranges = {"weight": gammas.get(name, (1.0, 1.0)), "bias": (0.0, 0.0)}
            if isinstance(module, _BatchNorm) and not subject.changed.keys() & set(OTHER_NORMS):
                found += [f"{name}.{key}" for key, usual in SETTINGS.items() if getattr(module, key) != usual]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = ROUNDING / math.sqrt(math.prod(module.weight.shape[1:])) if drawn else 0.0
            ranges = {"bias": (-bound, bound)}
        for key, (low, high) in ranges.items():
            values = getattr(module, key)
            if values is not None and not bool(((low <= values) & (values <= high)).all()):
                found.append(f"{name}.{key}")
    return found


def last_norms(model: nn.Module) -> list[str]:
    """Names of the norms at the end of timm's residual blocks."""
    blocks: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "zero_init_last")]
    return [f"{name}.bn3" if hasattr(block, "bn3") else f"{name}.bn2" for name, block in blocks if name]
