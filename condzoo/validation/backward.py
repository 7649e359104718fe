"""What every network promises of its backward pass: finite gradients, which are the derivative of its forward pass.

Finite differences along random lines show it. A shortcut that is detached, or a gradient that a hook halves, changes no
number of the forward pass and leaves every gradient finite.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from condzoo.validation.promises import Check
from condzoo.validation.subject import Subject

Loss = Callable[[Tensor], Tensor]

STEP = 1e-8  # of what a line moves
LINES = 3  # on one, by chance, the part that is missing may be small
AGREED = 0.02  # slopes on both sides are this close, or a ReLU's kink or amplified round-off lies between
TOLERANCE = 0.05  # of slopes that may be half of `AGREED` off
FARTHEST = 1e-3  # change of a loss, relative; it exceeds that where gradients explode, and is no slope any more
ROUNDOFF = 16 * torch.finfo(torch.float64).eps  # of a loss


def check_finite(subject: Subject) -> Check:
    """Loss finite, of maps that of their mean; every parameter that is used gets a gradient, and a finite one."""
    model = copy.deepcopy(subject.model)
    loss = loss_of(subject, model(subject.x))
    loss.backward()
    loss = loss.detach()
    used = [(n, p) for n, p in model.named_parameters() if not (subject.maps and n.startswith("last_bn."))]
    bad = [n for n, p in used if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    ok = bool(torch.isfinite(loss)) and not bad
    return Check(
        "finite", ok, f"loss {float(loss):.3g}" + (f"; no finite gradient in {', '.join(bad[:3])}" if bad else "")
    )


def loss_of(subject: Subject, out: Tensor) -> Tensor:
    """Cross-entropy of a network's output."""
    return nn.functional.cross_entropy(out.mean((2, 3)) if subject.maps else out, subject.y)


def check_backward(subject: Subject) -> Check:
    """Gradients are the derivative of the forward pass, as finite differences along random lines show it."""
    off = slope_error(copy.deepcopy(subject.model), partial(loss_of, subject), subject.x)
    if off is None:
        reason = "kinks or round-off, which this network amplifies, leave finite differences nothing to show"
        return Check("backward", True, reason, skipped=True)
    return Check("backward", off < TOLERANCE, f"slopes are those of the forward pass but for {off:.1g}, relative")


def slope_error(model: nn.Module, loss_of: Loss, x: Tensor) -> float | None:
    """How far backward's slopes of the loss are from the forward pass's, as a part of what is expected on such lines.

    A line moves every parameter, and x, by a random tensor of its own root mean square.

    Args:
        model: in float64, its parameters without a gradient; they have one afterwards.
        loss_of: the loss of the model's output.

    Returns:
        The largest of a few lines; None where finite differences do not show the slope.
    """
    x = x.clone().requires_grad_()
    loss = loss_of(model(x))
    loss.backward()
    held = {"": x} | dict(model.named_parameters())
    sizes = {name: float(tensor.detach().square().mean().sqrt()) for name, tensor in held.items()}
    grads = {name: tensor.grad for name, tensor in held.items() if tensor.grad is not None}
    here, expected = float(loss.detach()), sum(float(g.square().sum()) * sizes[n] ** 2 for n, g in grads.items()) ** 0.5
    if not abs(here) * ROUNDOFF / AGREED <= STEP * expected <= abs(here) * FARTHEST:
        return None
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(LINES):
        line = {n: sizes[n] * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in held.items()}
        ahead, behind = (_moved_loss(model, loss_of, held, line, step) for step in (STEP, -STEP))
        if not abs((ahead - here) - (here - behind)) <= AGREED * STEP * expected:
            return None
        by_backward = sum(float((grad * line[name]).sum()) for name, grad in grads.items())
        worst = max(worst, abs((ahead - behind) / (2 * STEP) - by_backward) / expected)
    return worst


@torch.no_grad()
def _moved_loss(
    model: nn.Module, loss_of: Loss, held: dict[str, Tensor], line: dict[str, Tensor], step: float
) -> float:
    moved = {name: torch.add(tensor, line[name], alpha=step) for name, tensor in held.items()}
    return float(loss_of(functional_call(model, moved, (moved.pop(""),))))
