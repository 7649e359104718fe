"""`measure`: every layer's conditioning, from forward and backward passes over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import nn

from condzoo.probe.arguments import checked, whole_seed
from condzoo.probe.arithmetic import full_float32
from condzoo.probe.batches import Adapter, as_pair, each, in_float64
from condzoo.probe.capture import capture_of
from condzoo.probe.conditioning import Conditioning
from condzoo.probe.copying import copied, copy_in_float64, made_inside
from condzoo.probe.layers import choose
from condzoo.probe.loss_copies import as_it_is, loss_beside, on, wide
from condzoo.probe.losses import LABELS, REDUCTIONS, Labels, Loss, loss_on, modules_of
from condzoo.probe.narrow_draws import narrow_draws
from condzoo.probe.passes import Passes
from condzoo.probe.preserving import preserved
from condzoo.probe.wrappers import refuse_threads, replica, unwrapped


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: str = "data",
    loss: Loss | None = None,
    layers: Sequence[str] | None = None,
    conv: str = "channels",
    device: str | torch.device | None = None,
    precision: str = "auto",
    seed: SupportsIndex = 0,
    bias: bool = False,
    adapter: Adapter | None = None,
    reduction: str | None = None,
    certify: bool = False,
    kappa: bool = True,
) -> Conditioning:
    """Measure the conditioning of every linear and convolution layer of any network.

    The model is measured in the mode it is in (train mode uses batch statistics) and is left bitwise as
    it was: parameters (unless the forward pass itself writes into them, as a momentum encoder's), buffers,
    .grad, requires_grad, mode, hooks, random streams (torch's, Python's, numpy's). So are buffers of a loss.
    Memory does not grow with the number of batches.

    Args:
        model: any module; of DDP and DataParallel the model inside is measured, in this process alone.
        batches: (x, y) pairs, for example a DataLoader, or one pair, of any sizes. x is a tensor, or a dict
            or tuple of the model's arguments; one pair of two tuples needs a list around it.
            Or dicts of the model's arguments with the targets under "labels" (Hugging Face's), which a forward
            that takes `labels` gets, too.
        labels: whose labels the gradients have: "data" (M's factor), "model" (F's: the exact expectation
            over the loss's own distribution, one backward pass a class or output coordinate) or "sample"
            (F's: one draw from it). The distribution is a softmax for cross-entropy, a unit-variance
            Gaussian for MSE, Bernoulli for BCE with logits. With BatchNorm's batch statistics "model" takes
            a pass a sample and class, and in batches of more than 512 of these a pass a class with a random
            sign a sample, whose mean is the expectation.
        loss: callable of (output, y), a mean or sum over the batch or one number a sample. None: the loss
            that the model returns in its output, else cross-entropy. With `certify`, or another device, a copy of
            the model runs, and a loss that uses the model itself must be a module that holds it.
        layers: names or shell patterns ("layer4.*"); None measures all.
        conv: "channels": every position of a feature map is a row; "patches": every patch is (K-FAC).
        device: where to measure; None: where the model is. Elsewhere copies of the model and the loss are used.
        precision: of products: "float64", "fast" (float32, summed in float64), or "auto": fast, and
            float64 at once for a layer whose spectrum reaches under fast's noise floor, or where it takes no longer.
        seed: of dropout, of label draws, and of what a loader without workers draws for its transforms.
        bias: add a constant 1 to the inputs of layers that have a bias.
        adapter: turns one of `batches` into (x, y), where they are of another form.
        reduction: of the loss over the batch, "mean" or "sum"; None: as its `.reduction` says, else mean.
        certify: measure the first batch again, also through a float64 copy of the model, and report in
            `certificate` how far the dtype of the forward and backward pass moved each spectrum.
        kappa: False computes lambda_max alone, of large moments by Lanczos; condition numbers are then NaN,
            with the status "not computed". "auto" precision is "fast" then.

    Returns:
        A `Conditioning`: layer name to `LayerConditioning`, in forward order.

    Raises:
        ValueError: an unknown option or layer name, no batches, or labels that the loss cannot give.

    Source: arXiv:2002.10801, sec. 3.
    """
    seed = whole_seed(seed)
    whose: Labels = checked("labels", labels, LABELS)
    model = replica(model)
    refuse_threads(model)
    chosen, skipped = choose(model, layers)
    where = None if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0", say
    elsewhere = where is not None and any(p.device != where for p in model.parameters())
    with torch.inference_mode(False):  # what is made inside has no gradients
        if elsewhere or made_inside(model):
            memo: dict[int, Any] = {}
            original, model = model, copied(model, memo)
            model = model if where is None else model.to(where)
            loss = loss_beside(loss, original, memo, as_it_is if where is None else on(where))
            chosen, skipped = choose(model, layers)
        elif where is not None:
            loss = loss_on(loss, where)
    capture = capture_of(model, chosen, conv=conv, precision=precision, bias=bias, kappa=kappa)
    if reduction is not None:
        checked("reduction", reduction, REDUCTIONS)
    run = Passes(model, capture, whose, loss, seed, reduction)
    first: list[tuple[Any, Any]] = []
    kind = next((p.device.type for p in model.parameters()), "cpu")
    with (
        preserved(model, seed, *modules_of(loss)),
        torch.inference_mode(False),
        torch.enable_grad(),
        full_float32(kind),
    ):
        capture.attach()
        try:
            for batch in each(batches, adapted=adapter is not None):
                x, y = as_pair(batch, unwrapped(model) if loss is None else None) if adapter is None else adapter(batch)
                first = first or [(x, y)]
                run.one(x, y)
        finally:
            capture.detach()
    result = run.result(skipped)
    if not certify:
        return result
    options = {"labels": labels, "loss": loss, "layers": layers, "conv": conv, "bias": bias, "seed": seed}
    options["reduction"] = reduction
    return replace(result, certificate=certificate(model, first, options))


def certificate(model: nn.Module, batch: list[tuple[Any, Any]], options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far the dtype of the pass itself moved each spectrum of one batch, by layer.

    Returns:
        For each layer and side (`input`, `output_grad`): `{side}_lambda_max`, its relative error (left out where the
        exact one is 0 and the own is not), and
        `{side}_known`, the largest p such that every eigenvalue before it moved by less than 10 %. Only a
        second pass in float64 shows this: no arithmetic of the probe restores what the first one lost.
    """
    own = measure(model, batch, precision="float64", **options)
    with torch.inference_mode(False):
        batch = [(in_float64(x), in_float64(y)) for x, y in batch]
        memo: dict[int, Any] = {}
        copy = copy_in_float64(model, memo)
        options["loss"] = loss_beside(options["loss"], model, memo, wide)
    with narrow_draws(model):
        exact = measure(copy, batch, precision="float64", **options)
    found: dict[str, dict[str, float]] = {}
    for name in own.keys() & exact.keys():
        found[name] = {}
        for side in ("input", "output_grad"):
            a, b = getattr(own[name], side), getattr(exact[name], side)
            moved = (a.eigenvalues - b.eigenvalues).abs() / b.eigenvalues
            moved = torch.where(a.eigenvalues == b.eigenvalues, 0.0, moved)  # also where both are 0
            wrong = (moved >= 0.1).nonzero()
            if math.isfinite(float(moved[0])):
                found[name][f"{side}_lambda_max"] = float(moved[0])
            found[name][f"{side}_known"] = (int(wrong[0]) if len(wrong) else b.dim) / b.dim
    return {name: found[name] for name in own if name in found}
