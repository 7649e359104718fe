"""The optimizer a recipe describes, from torch.optim."""

from typing import Any

import torch
from torch import Tensor, nn

from condzoo.training.schema import Adam, AdamW, Optimizer, Sgd


def build_optimizer(section: Optimizer, model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    """An optimizer of every parameter of the model that is not frozen.

    With `decay_norm = false` the weight decay spares every 1-D parameter: scales and shifts of
    norms, and biases. `fused`: in one kernel, which can leave out an update without asking the host.

    Raises:
        ValueError: every parameter is frozen.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("freeze: every parameter of the network is frozen; nothing is left to train")
    groups = _decay_groups(parameters, section.weight_decay, section.decay_norm)
    optimizer = _optimizer(section, groups, fused or None)
    forget(optimizer)
    return optimizer


def _optimizer(section: Optimizer, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    lr = section.lr
    match section:
        case AdamW():
            return torch.optim.AdamW(groups, lr=lr, betas=_pair(section.betas), eps=section.eps, fused=fused)
        case Adam():
            return torch.optim.Adam(groups, lr=lr, betas=_pair(section.betas), eps=section.eps, fused=fused)
        case Sgd():
            return torch.optim.SGD(groups, lr=lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Start the optimizer's state anew.

    Fused SGD leaves new momentum uninitialized where its first update is left out: there it starts from
    zeros, which gives the same first update.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float, decay_norm: bool) -> list[dict[str, Any]]:
    if decay_norm or weight_decay == 0:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _pair(betas: list[float]) -> tuple[float, float]:
    first, second = betas
    return first, second


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, "<parameter's number>.<name>"; lr and the like follow the recipe."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in the memory format of each parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, stored in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if stored.shape == parameter.shape and stored.ndim:
            # Elementwise kernels may round differently on another layout: keep the one training had.
            value = torch.empty_like(parameter, dtype=stored.dtype).copy_(stored)
        else:
            fused = bool(optimizer.param_groups[0]["fused"])  # then Adam counts its steps on the device
            value = stored.to(parameter.device if fused else "cpu", copy=True)
        optimizer.state[parameter][name] = value
