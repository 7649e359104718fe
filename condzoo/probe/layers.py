"""Which modules are layers with an input and an output moment, and what their rows are.

A linear layer's input [n, ..., d] gives one row per leading index. A convolution's [n, c, h, w] gives
n * h * w rows of c (`conv="channels"`) or one row of c * kh * kw an output position (`"patches"`).
Grouped convolutions give one block a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from condzoo.probe.attention import projections
from condzoo.probe.patches import unfolded
from condzoo.probe.wrappers import named_modules

Conv = Literal["channels", "patches"]
CONVS = ("channels", "patches")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNELS_FIRST = (*CONVOLUTIONS, *TRANSPOSED)
MEASURED = (nn.Linear, *CHANNELS_FIRST)
PLAIN = {kind.forward for kind in MEASURED}
NAMED_BY_LAYERS = (nn.MultiheadAttention, ParametrizationList)  # whose own matrices are those of layers
LINEAR_OF_OTHERS = {"transformers.pytorch_utils.Conv1D"}  # GPT-2's, whose weight is [in, out]
NAMES_OF_OTHERS = {full.rpartition(".")[2] for full in LINEAR_OF_OTHERS}

ROWS_A_PIECE = 64  # rows of a linear layer multiplied together before float64 takes over
ROWS_OF_PATCHES = 512  # the same of patches, whose products are larger: adding them up costs more

INTERACTING: WeakSet[nn.Module] = WeakSet()  # private copies, in the mode that they were seen in

REASONS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "its input is indices, which have no second moment"),
    (nn.RNNBase, "a recurrent layer runs its matrices inside one kernel; their inputs are not visible"),
    (nn.Bilinear, "its output is bilinear in two inputs, not linear in one"),
)


def kind(module: nn.Module) -> str:
    """How a layer is named in a record: "Linear", "Conv2d", "depthwise Conv2d", "grouped Conv2d", ..."""
    name = next(base.__name__ for base in type(module).__mro__ if base in MEASURED or _of_others(base))
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return name
    return ("depthwise " if groups == module.in_channels else "grouped ") + name


def is_measured(module: nn.Module) -> bool:
    """Whether this is a linear or convolution layer."""
    return isinstance(module, MEASURED) or any(map(_of_others, type(module).__mro__))


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's class has a forward of its own, which may do more than multiply."""
    return type(layer).forward not in PLAIN


def _of_others(kind: type) -> bool:
    """Whether this is a class of `LINEAR_OF_OTHERS`."""
    return kind.__name__ in NAMES_OF_OTHERS and f"{kind.__module__}.{kind.__qualname__}" in LINEAR_OF_OTHERS


def check_module(model: Any) -> None:
    """TypeError where a model's name, say, is given in place of a model; ValueError for one on Apple's GPUs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} {model!r:.40}")
    if any(p.device.type == "mps" for p in model.parameters()):
        raise ValueError("the model is on MPS, which has no float64, and sums are in float64; use model.to('cpu')")


def choose(
    model: nn.Module, names: Sequence[str] | None, *, known: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to measure, by name, and those that cannot be, with the reason.

    Args:
        model: any module.
        names: layer names or shell patterns ("stage1.*"); None takes all.
        known: each name matched a layer once; one that no longer does is no error, and among those that cannot be.

    Raises:
        TypeError: not a module, or not a list of names.
        ValueError: a name that matches no layer; says the closest. No names. A model on MPS.
    """
    check_module(model)
    if isinstance(names, str):
        raise TypeError(f"layers must be a list of names, got a string; write layers=[{names!r}]")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers must be a list of names, got {names!r:.60}")
    if names is not None and not len(names):
        raise ValueError("layers must name at least one layer, got none; leave it out (None) to measure all of them")
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in named_modules(model):
        if (why := _reason(module)) is not None:
            skipped[name] = why
        elif is_measured(module):
            found[name] = module
        elif isinstance(module, nn.MultiheadAttention):
            found |= {f"{name}.{local}" if name else local: p for local, p in projections(module).items()}
    if names is None:
        return found, skipped
    chosen = {n: m for n, m in found.items() if any(_matches(n, pattern) for pattern in names)}
    named = {n: why for n, why in skipped.items() if any(_matches(n, p) for p in names)}
    for pattern in names:
        if any(_matches(n, pattern) for n in found):
            continue
        if not known:
            raise ValueError(_no_layer(pattern, model, found, skipped))
        named.setdefault(pattern, "the model no longer has a layer of this name")
    return chosen, named


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may have brackets itself


def _no_layer(pattern: str, model: nn.Module, found: dict[str, nn.Module], skipped: dict[str, str]) -> str:
    if pattern in skipped:
        return f"layer {pattern!r} cannot be measured: {skipped[pattern]}"
    meant = dict(model.named_modules(remove_duplicate=False)).get(pattern)
    for name, module in found.items():
        if module is meant:
            return f"layer {pattern!r} is {name!r} under another name; it is measured under that one"
    close = get_close_matches(pattern, found, n=1, cutoff=0.0)
    hint = f"did you mean {close[0]!r}?" if close else "the model has no linear or convolution layer"
    return f"no layer matches {pattern!r}; {hint}"


def _reason(module: nn.Module) -> str | None:
    own = [p for p in module._parameters.values() if p is not None]
    if any(isinstance(p, UninitializedParameter) for p in own):
        return "not initialized yet (lazy); run one batch through the model first"
    if any(p.is_complex() for p in own):
        return "its weights are complex"
    for classes, why in REASONS:
        if isinstance(module, classes):
            return f"{type(module).__name__}: {why}"
    if is_measured(module) or isinstance(module, NAMED_BY_LAYERS):
        return None
    # Beside layers a matrix may be a table of positions; beside an activation it is what the module multiplies by.
    if any(p.ndim >= 2 for p in own) and not any(True for child in module.children() for _ in child.parameters()):
        return f"{type(module).__name__} is not a linear or convolution layer"
    return None


def input_columns(module: nn.Module, x: Tensor, conv: Conv) -> Iterator[Float[Tensor, "b g d k"]]:
    """A layer's input as pieces [b, groups, d, k] of k rows of d coordinates each."""
    if not isinstance(module, CHANNELS_FIRST):
        return _rows(x.flatten(0, -2) if x.ndim > 1 else x[None])
    x = x[None] if x.ndim == _spatial(module) + 1 else x
    if conv == "patches" and isinstance(module, CONVOLUTIONS):
        return unfolded(x, module, ROWS_OF_PATCHES)
    return _positions(x, _groups(module))


def reading(module: nn.Module, conv: Conv) -> tuple[object, ...]:
    """What `input_columns` of one and the same tensor depends on."""
    if not isinstance(module, CHANNELS_FIRST):
        return ()
    if conv == "patches" and isinstance(module, CONVOLUTIONS):
        geometry = module.kernel_size, module.stride, module.padding, module.dilation
        return (module.groups, module.padding_mode, *geometry)
    return (module.groups,)


def output_columns(module: nn.Module, grad_h: Tensor) -> Iterator[Float[Tensor, "b g d k"]]:
    """A layer's output gradient as pieces [b, groups, d, k]."""
    if not isinstance(module, CHANNELS_FIRST):
        return _rows(grad_h.flatten(0, -2) if grad_h.ndim > 1 else grad_h[None])
    grad_h = grad_h[None] if grad_h.ndim == _spatial(module) + 1 else grad_h
    return _positions(grad_h, _groups(module))


def with_constant(columns: Tensor) -> Tensor:  # [b, g, d, k] -> [b, g, d + 1, k]
    """The columns with a constant 1 below: the bias seen as one more input."""
    return torch.cat([columns, columns.new_ones((*columns.shape[:2], 1, columns.shape[3]))], dim=2)


def samples_interact(model: nn.Module) -> bool:
    """Whether a BatchNorm computes statistics of the batch, so that a sample's output depends on the others.

    Of one that is called as a function, a pass alone shows it: such models are among `INTERACTING`.
    """
    return model in INTERACTING or any(
        isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules()
    )


def _spatial(module: nn.Module) -> int:
    return next(d for d in (1, 2, 3) if isinstance(module, (CONVOLUTIONS[d - 1], TRANSPOSED[d - 1])))


def _groups(module: nn.Module) -> int:
    assert isinstance(module, CHANNELS_FIRST)
    return module.groups


def _rows(x: Float[Tensor, "r d"]) -> Iterator[Float[Tensor, "b g d k"]]:
    whole = x.shape[0] // ROWS_A_PIECE * ROWS_A_PIECE
    if whole:
        yield x[:whole].reshape(-1, ROWS_A_PIECE, x.shape[1]).mT[:, None]
    if whole < x.shape[0]:
        yield x[whole:].mT[None, None]


def _positions(x: Float[Tensor, "n c *hw"], groups: int) -> Iterator[Float[Tensor, "b g d k"]]:
    images, channels, *spatial = x.shape
    positions = math.prod(spatial)
    if groups == 1 and channels > positions:  # many channels, few positions: rows are cheaper
        yield from _rows(x.flatten(2).mT.flatten(0, 1))
    else:
        yield x.reshape(images, groups, channels // groups, positions)
