"""Copies of a network, also of one that still holds what its last forward pass computed."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model.

    Attention maps or features that its modules have kept, and the weights of pruned layers, are parts of a graph, which
    torch refuses to copy: of these the copy has the values alone. In lists, tuples and dicts they are found, too.
    """
    kept = [part for module in model.modules() for part in tree_leaves(vars(module)) if isinstance(part, Tensor)]
    return copy.deepcopy(model, {id(part): part.detach().clone() for part in kept if not part.is_leaf})
