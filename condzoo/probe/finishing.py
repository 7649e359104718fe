"""From running sums to spectra: eigenvalues batched by size, noise floors, nulls, and what was skipped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from condzoo.probe import moments as running
from condzoo.probe.arithmetic import SAFETY, data_noise, float64_noise, in_tf32
from condzoo.probe.attention import parts_of
from condzoo.probe.capture import Capture
from condzoo.probe.conditioning import LayerConditioning
from condzoo.probe.eigenvalues import SMALL, eigvalsh, symmetric_eigenvalues
from condzoo.probe.lanczos import largest_eigenvalues
from condzoo.probe.layer_sums import LayerSums
from condzoo.probe.layers import is_measured, kind
from condzoo.probe.moments import RunningMoment
from condzoo.probe.nulls import ZERO, ZERO_IN_FLOAT64, Head, structural_nulls, zero_coordinates, zero_sum_remainder
from condzoo.probe.spectra import Spectrum, from_blocks
from condzoo.probe.weights import Norms, own_weight

TF32 = torch.float16  # has as many digits
DECOMPOSED = 256  # side up to which one eigenvalue costs no less than all
FINER = 5  # times: eigenvalues of float64 data are to be right to 1 %, those of others to 5
SMALLEST_SQUARE = SAFETY * torch.finfo(torch.float64).tiny  # under it products lose digits to the range's end
LANCZOS = 1e-8  # residual over lambda_max
COPIED = 1 << 20  # numbers of one moment that come from a GPU to be read, at most: 8 MB

NOT_CALLED = "not called in the forward pass, or only without gradients"
USED = (
    "not called itself, though its weight is used: by a layer that shares it, or by another function than F.linear, "
    "whose rows are not seen"
)
MIXED_WIDTHS = "called at several widths, whose rows cannot be added up"
NO_ROWS = "called on empty inputs alone"
NO_GRADIENT = "no gradient reaches its output: the loss does not depend on it, or all before it is frozen"


def finish(
    capture: Capture,
    weights: Mapping[str, Norms],
    weight_grads: Mapping[str, Norms],
    *,
    softmax: bool | None = None,
    mean: bool = True,
    counted: float = 1.0,
    loss_dtype: torch.dtype | None = None,
) -> tuple[dict[str, LayerConditioning], dict[str, str], dict[str, str]]:
    """What the capture has seen.

    Args:
        capture: after its forward and backward passes.
        weights, weight_grads: of W and of dL/dW by layer name, where known.
        softmax: whether the loss is a softmax cross-entropy; None: not known.
        mean: whether it is a mean over a sample's positions, too, where it has many labels.
        counted: share of the labels that it is over; masked tokens are left out.
        loss_dtype: that it is computed in; None: not seen, that of the layers.

    Returns:
        Layers in forward order, the skipped with their reasons, and the first layer with NaN or Inf
        by direction ("forward", "backward").
    """
    capture.sums = {name: sums for name, sums in capture.sums.items() if sums.samples}  # the others had a place alone
    uncalled = [name for name in capture.layers if name not in capture.sums]
    skipped = {name: _not_called(name, capture, used=name in weight_grads) for name in uncalled}
    good: dict[str, LayerSums] = {}
    for name, sums in capture.sums.items():
        why = _unusable(sums)
        if why is None:
            good[name] = sums
        else:
            skipped[name] = why
    moments = [m for sums in good.values() for m in (sums.input, sums.output_grad)]
    if capture.trains and any(_in_tf32(capture.layers[name], sums.input) for name, sums in good.items()):
        for moment in moments:
            moment.coarsen(TF32)
    head = _head(capture, good, softmax, mean, counted, loss_dtype) if _has_the_last(capture, list(good)) else None
    dtypes = capture.dtypes | {moment.dtype for moment in moments}  # those of a process without a batch, the others'
    wide = dtypes | {loss_dtype or torch.float64} == {torch.float64}
    spectra = spectra_of(moments, kappa=capture.kappa, head=head, zero=ZERO_IN_FLOAT64 if wide else ZERO)
    layers = {
        name: LayerConditioning(
            kind=kind(capture.layers[name]),
            input=spectra[2 * i],
            output_grad=spectra[2 * i + 1],
            weight=weights[name].sigma_max if name in weights else None,
            weight_grad=weight_grads[name].sigma_max if name in weight_grads else None,
            samples=sums.samples,
            positions=sums.input.rows // max(1, sums.samples),
            weight_frobenius=weights[name].frobenius if name in weights else None,
            weight_grad_frobenius=weight_grads[name].frobenius if name in weight_grads else None,
        )
        for i, (name, sums) in enumerate(good.items())
    }
    return layers, skipped, _first_nonfinite(capture)


def _in_tf32(layer: nn.Module, read: RunningMoment) -> bool:
    """Whether a layer of a training multiplies in TF32, by what torch is set to now; in `measure` none does."""
    return read.dtype == torch.float32 and in_tf32(read.device, convolution=isinstance(layer, _ConvNd))


def _not_called(name: str, capture: Capture, *, used: bool) -> str:
    parts = [part for part in parts_of(name) if part in capture.sums]
    if parts:
        return f"its parts are layers of their own: {', '.join(parts)}"
    return USED if used else NOT_CALLED


def _has_the_last(capture: Capture, good: list[str]) -> bool:
    """Whether the last of the good layers is the network's: none after it was skipped, or left out by `layers`."""
    reached = [name for name, sums in capture.sums.items() if sums.output_grad.vectors]
    measurable = [name for name, module in capture.modules.items() if is_measured(module)]
    return good != [] and good[-1:] == reached[-1:] and all(name in capture.layers for name in measurable[-1:])


def _head(
    capture: Capture,
    good: Mapping[str, LayerSums],
    softmax: bool | None,
    mean: bool,
    counted: float,
    loss_dtype: torch.dtype | None,
) -> Head:
    name = next(reversed(list(good)))
    grads, weight = good[name].output_grad, own_weight(capture.layers[name])
    unit = good[name].samples / max(1.0, counted * grads.rows) if mean else 1.0
    dtypes = grads.dtype if weight is None else weight.dtype, loss_dtype or torch.float64
    return Head(softmax, unit, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def spectra_of(
    moments: list[RunningMoment], *, kappa: bool = True, head: Head | None = None, zero: float = ZERO
) -> list[Spectrum]:
    """The spectra of input and output-gradient moments in turn; without `kappa` their largest eigenvalues alone.

    `head`: the last two are of the network's last layer; `zero`: as of `zero_sum_remainder`.
    """
    moments = [_near(moment) for moment in moments]
    values = eigenvalues_of(moments, top_only=not kappa)
    diagonals = [moment.diagonal() for moment in moments]
    largest = [float(diagonal.max()) for diagonal in diagonals]
    heads = {len(moments) - 1: head}
    remainders = [  # of a single row the sum is small by chance in one of a thousand layers
        zero_sum_remainder(m.squared_sum(), diagonals[i], m.dtype, heads.get(i), zero=zero)
        if i % 2 and m.vectors > 1
        else None
        for i, m in enumerate(moments)
    ]
    # The gradient p - y of a softmax cross-entropy loses digits where p is close to y. How far its rows are
    # from a sum of zero shows that noise, and the gradients of all layers before it have it too.
    noise = max((r / top for r, top in zip(remainders, largest, strict=True) if r), default=0.0)
    return [
        _spectrum(m, values[i], largest[i], noise * (i % 2), kappa=kappa, sums_to_zero=remainders[i] is not None)
        for i, m in enumerate(moments)
    ]


def _near(moment: RunningMoment) -> RunningMoment:
    """A small moment of a GPU on the CPU: the GPU would be waited for with each number that is read of it."""
    held = moment.pending if moment.total is None else [moment.total]
    if moment.device.type == "cpu" or moment.side > SMALL or sum(part.numel() for part in held) > COPIED:
        return moment
    total = None if moment.total is None else moment.total.cpu()
    return replace(moment, total=total, pending=[part.cpu() for part in moment.pending])


def eigenvalues_of(moments: list[RunningMoment], *, top_only: bool = False) -> list[Float[Tensor, "g m"]]:
    """Eigenvalues of each moment's groups from the smaller Gram side, all of one size decomposed at once.

    Args:
        moments: with at least one row each.
        top_only: only the largest, [g, 1], above side 256 by Lanczos.
    """
    by_size: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    values: dict[int, Tensor] = {}
    for i, moment in enumerate(moments):
        if top_only and moment.side > DECOMPOSED:
            values[i] = _largest(moment)
        else:
            by_size[moment.side, moment.device].append(i)
    batches = [[moments[i].decomposable() for i in members] for members in by_size.values()]
    every = symmetric_eigenvalues([torch.cat(matrices) for matrices in batches])
    for members, matrices, found in zip(by_size.values(), batches, every, strict=True):
        for i, part in zip(members, found.cpu().split([m.shape[0] for m in matrices]), strict=True):
            values[i] = part[:, -1:] if top_only else part
    return [values[i] for i in range(len(moments))]


def _largest(moment: RunningMoment) -> Float[Tensor, "g 1"]:
    """Each group's largest eigenvalue, by Lanczos to 1e-8 of itself, or in full where that does not converge."""
    tops = []
    for product in moment.products():
        found = largest_eigenvalues(product, moment.side, tolerance=LANCZOS)
        if float(found.residuals[0]) > LANCZOS * float(found.values[0]):
            return eigvalsh(moment.decomposable())[:, -1:].cpu()
        tops.append(found.values)
    return torch.stack(tops)


def _spectrum(
    moment: RunningMoment,
    values: Float[Tensor, "g m"],
    diagonal: float,
    noise: float,
    *,
    kappa: bool,
    sums_to_zero: bool,
) -> Spectrum:
    """values: m = d, or the number of vectors where that is smaller, or 1 without kappa.

    diagonal: max_i E[x_i^2]; noise: over E[x_i^2].
    """
    dim, largest = moment.dim, max(0.0, float(values.max()))
    # A block of side 1 is a sum of squares: rounding moves it by a part of itself, however small it is beside others.
    apart = dim == 1
    of_data = max(data_noise(moment.dtype, 0.0 if apart else diagonal, moment.grain), SAFETY * noise * diagonal)
    of_sum = 0.0 if apart else float64_noise(dim, largest) * (FINER if moment.dtype == torch.float64 else 1)
    floor = of_data + moment.noise / max(1, moment.rows) + of_sum
    how = f"{'float32' if moment.fast else 'float64'} products of {str(moment.dtype).removeprefix('torch.')} data"
    if not kappa:
        return from_blocks(values, floor, moment.vectors, arithmetic=how, size=dim * values.shape[0])
    padded = values
    if values.shape[1] < dim:
        padded = torch.cat([values, values.new_zeros((values.shape[0], dim - values.shape[1]))], dim=1)
    plain = from_blocks(padded, floor, moment.vectors, arithmetic=how)
    if plain.rank >= plain.reachable:
        return plain
    if moment.total is None:
        nulls, why = zero_coordinates(torch.cat(moment.pending, dim=2))
    else:
        seen = {"sums_to_zero": sums_to_zero, "vanished": moment.vanished, "exact": not moment.fast}
        nulls, why = structural_nulls(moment.total, **seen)
    nulls = min(nulls, plain.dim - plain.rank)
    return from_blocks(padded, floor, moment.vectors, nulls=nulls, null_reason=why, arithmetic=how)


def _unusable(sums: LayerSums) -> str | None:
    if sums.hidden is not None:
        return sums.hidden
    if sums.input.mixed or sums.output_grad.mixed:
        return MIXED_WIDTHS
    if not sums.input.finite:
        return "its input holds NaN or Inf"
    if sums.samples and not sums.input.vectors:
        return NO_ROWS
    if not sums.output_grad.vectors:
        return NO_GRADIENT
    if not sums.output_grad.finite:
        return "the gradient of its output holds NaN or Inf"
    for what, moment in (("its input", sums.input), ("the gradient of its output", sums.output_grad)):
        if moment.dropped is not None:
            return f"{what} {_too_large(moment)}"
        if _leaves_float64(moment):
            return f"the squares of {what} leave float64's range: its numbers are under 1e-153 or over 1e154, about"
    return None


def _too_large(moment: RunningMoment) -> str:
    """Of one that was dropped, in words that follow those for the data."""
    groups, dim, _ = moment.shape
    taken, limit = (8 * numbers / 2**30 for numbers in (groups * dim * min(dim, moment.vectors), running.LIMIT))
    return (
        f"has {groups * dim:,} coordinates and {moment.vectors:,} rows, whose moment would take {taken:.3g} GB, over "
        f"the limit of {limit:.3g} GB: measure fewer rows, or leave the layer out by `layers`"
    )


def _leaves_float64(moment: RunningMoment) -> bool:
    """Whether squares of float64 data overflow, or all of them lose digits to the end of the range; not of zeros."""
    if moment.dtype != torch.float64:
        return False
    squares = moment.diagonal()
    if not math.isfinite(float(squares.sum()) * max(1, moment.rows)):
        return True
    some = moment.vanished or bool(squares.any()) or any(bool(part.any()) for part in moment.pending)
    return some and float(squares.max()) < SMALLEST_SQUARE


def _first_nonfinite(capture: Capture) -> dict[str, str]:
    """The first layer in the order of each pass; backward runs from the last layer to the first."""
    backward = [name for name, sums in reversed(capture.sums.items()) if not sums.output_grad.finite]
    capture.origin.find(everywhere=bool(backward))
    readers = [name for name, sums in capture.sums.items() if not sums.input.finite]  # of other processes, too
    forward = readers if capture.origin.name is None else [capture.origin.name]
    found = {"forward": forward[:1], "backward": backward[:1]}
    return {direction: names[0] for direction, names in found.items() if names}
