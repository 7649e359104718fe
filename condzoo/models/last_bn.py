"""The last BN: one BatchNorm1d on the input of the last linear layer (arXiv:2002.10801).

A network that has one keeps it as `model.last_bn`: its state dict is the plain network's plus `last_bn.*`.
Shapes: B examples, D features.
"""

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

GAMMA_INITS = ("ones", "uniform")
ADDED_BIAS = "bias_added_for_last_bn"  # attribute of a head that had no bias before it took a last BN's statistics


def check_module(model: object) -> None:
    """TypeError where a model's name, say, is given in place of a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} {str(model)[:40]!r}")


def build_last_bn(num_features: int, init: str = "ones") -> nn.BatchNorm1d:
    """The layer, with beta zero and gamma by name.

    Args:
        num_features: D, the classifier's input size.
        init: gamma: "ones", or "uniform": U(0, 1), torch7's default, which the authors' code leaves in place.

    Raises:
        ValueError: an unknown `init`.
    """
    if init not in GAMMA_INITS:
        close = difflib.get_close_matches(str(init), GAMMA_INITS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown last_bn_init {init!r}; {hint}one of: {', '.join(GAMMA_INITS)}")
    bn = nn.BatchNorm1d(num_features)
    if init == "uniform":
        nn.init.uniform_(bn.weight, 0.0, 1.0)
    return bn


def check_batch(x: Tensor, last_bn: nn.Module) -> None:
    """Reject a batch that has no variance, in words that say what to do.

    Args:
        x: the last BN's input, [B, D].
        last_bn: takes its statistics from the batch in train mode; synchronized, from those of all processes.

    Raises:
        ValueError: one example in training mode. None is no error: it leaves the running statistics alone.
    """
    if isinstance(last_bn, nn.BatchNorm1d) and last_bn.training and x.shape[0] == 1:
        raise ValueError(
            f"the last BN needs at least 2 examples in training mode, got a batch of {x.shape[0]}; "
            "call model.eval() or use a larger batch"
        )


def reset_to_identity_(bn: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """Make `bn` exactly the identity in eval mode: gamma 1, beta 0, mean 0, variance 1 - eps."""
    with torch.no_grad():
        for name, value in identity_state(bn, bn.weight.device).items():
            getattr(bn, name).copy_(value)
    return bn


def identity_state(bn: _BatchNorm, device: torch.device) -> dict[str, Tensor]:
    """The state dict that makes `bn` the identity in eval mode, on `device`."""
    d, dtype = bn.num_features, bn.weight.dtype
    return {
        "weight": torch.ones(d, dtype=dtype, device=device),
        "bias": torch.zeros(d, dtype=dtype, device=device),
        "running_mean": torch.zeros(d, dtype=dtype, device=device),
        "running_var": torch.full((d,), 1 - bn.eps, dtype=dtype, device=device),
        "num_batches_tracked": torch.tensor(0, device=device),
    }


def accept_plain_weights(model: nn.Module) -> None:
    """Let `model.load_state_dict` take the state dict of the network without the last BN.

    Where a state dict has all of the network but no `last_bn.*`, the last BN becomes the identity in eval
    mode: the outputs are the plain network's, and no key counts as missing. So does a bias that `insert_last_bn` gave
    the head (`ADDED_BIAS`), as zero. A state dict that lacks other keys too leaves the last BN alone.
    """
    model.register_load_state_dict_pre_hook(fill_in_last_bn)


def fill_in_last_bn(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """The hook of `accept_plain_weights`: a module-level function, so that copy and pickle keep it."""
    bn = getattr(model, "last_bn", None)
    own = prefix + "last_bn."
    if not isinstance(bn, _BatchNorm) or any(key.startswith(own) for key in state_dict):
        return
    added = {f"{prefix}{name}.bias": m.bias for name, m in model.named_modules() if hasattr(m, ADDED_BIAS)}
    body = [prefix + key for key in model.state_dict() if not key.startswith("last_bn.")]
    # BatchNorm itself does without this counter: older published weights lack it
    body = [key for key in body if not key.endswith("num_batches_tracked") and key not in added]
    if all(key in state_dict for key in body):
        device = next((state_dict[key].device for key in body), bn.weight.device)
        for key, bias in added.items():
            state_dict.setdefault(key, torch.zeros_like(bias, device=device))
        state_dict.update({own + name: value for name, value in identity_state(bn, device).items()})
