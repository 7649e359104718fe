"""The layers' weights in one training step: the norms of each, and its gradient summed over the backward passes.

A weight is read as the forward pass sees it: one sharded over processes (FSDP) is whole only then, and its
gradient is the process's own only before it is averaged. It is looked at after the layer's call, before hooks that
shard it again: only then is it sure to be the one that was used, whatever hooks have computed it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle, unserializable_hook

from condzoo.probe.attention import packed_weights, watch_computed_inside
from condzoo.probe.calls import STRIDED, layout, of_transform, weight_now
from condzoo.probe.hooks import Hook, apart, remove
from condzoo.probe.preserving import at_rest
from condzoo.probe.views import shown
from condzoo.probe.weights import Norms, norms_of, own_weight, watch_computed, widened
from condzoo.probe.wrappers import in_transform


class StepWeights:
    """Watches the weights of some layers from `attach` to `detach`; with measured=False, only which are split.

    Attributes:
        norms: of each weight, by layer name.
        grads: sum of each weight's gradients over the backward passes seen.
        split: layers whose weight is split over processes even in the forward pass (tensor parallelism).
        later: this process has a part of one that is not the first: it may compute on samples that the first one has.
        reads: whether a call of a layer now is of a pass that is read.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], attentions: Mapping[str, nn.MultiheadAttention], *, measured: bool = True
    ) -> None:
        self.layers, self.attentions, self.measured = layers, attentions, measured
        self.norms: dict[str, Norms] = {}
        self.grads: dict[str, Tensor] = {}
        self.split: set[str] = set()
        self.later = False
        self.reads: Callable[[], bool] = lambda: True
        self._own: dict[str, Tensor] = {}  # the weights that are whole at rest
        self._own_handles: dict[str, list[RemovableHandle]] = {}  # of those that require a gradient
        self._seen: dict[str, Tensor] = {}  # of those in their place, the last one each
        self._run: set[str] = set()  # whose layer has run in this step
        self._passes: dict[str, set[int]] = defaultdict(set)
        self._read: set[int] = set()  # backward passes in which a gradient came to a call that is read,
        self._unread: set[int] = set()  # and to one that is not
        self._inside: dict[str, tuple[int, Tensor]] = {}  # a backward pass within another, and what it gave
        self._generated: dict[str, tuple[int, Tensor | None]] = {}  # the sum before a pass, and which
        self._outer: list[int] = []  # backward passes that run now and have run a forward: checkpointing, reentrant
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on, after forgetting all that was seen."""
        self.clear()
        for name, module in self.layers.items():
            before, after = partial(self._before_layer, name), partial(self._after_layer, name)
            self._handles.append(module.register_forward_pre_hook(Hook(before, module)))
            self._handles.append(module.register_forward_hook(Hook(after, module), prepend=True))
            self._handles.append(watch_computed(module, partial(self.look, name)))
        for name, attention in self.attentions.items():
            before, after = partial(self._before_attention, name), partial(self._after_attention, name)
            self._handles.append(attention.register_forward_pre_hook(Hook(before, attention)))
            self._handles.append(attention.register_forward_hook(Hook(after, attention), prepend=True))
            self._handles += watch_computed_inside(attention, partial(self._look_inside, name))
        self._follow_own(self._whole())

    def detach(self) -> None:
        """Take the hooks off."""
        remove(self._handles)
        self._follow_own({})
        self._seen.clear()
        self._inside.clear()
        self._generated.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.norms, self.grads = {}, {}
        self.split.clear()
        self.later = False
        self._run.clear()
        self._passes.clear()
        self._read.clear()
        self._unread.clear()
        self._forget_running()

    def snapshot(self) -> Callable[[], None]:
        """What undoes all that will be seen from here on, should the pass that follows raise."""
        norms, grads, run = dict(self.norms), dict(self.grads), set(self._run)
        passes = defaultdict(set, {name: set(ids) for name, ids in self._passes.items()})
        return partial(self._undo, norms, grads, run, passes)

    def _undo(
        self, norms: dict[str, Any], grads: dict[str, Tensor], run: set[str], passes: defaultdict[str, set[int]]
    ) -> None:
        self.norms, self.grads, self._run, self._passes = norms, grads, run, passes
        self._forget_running()  # none runs any more, and one that raised has not taken itself out

    def _forget_running(self) -> None:
        self._outer.clear()
        self._inside.clear()
        self._generated.clear()

    def measure(self) -> None:
        """The norms of all weights that are whole at rest; the others follow when their layers run.

        Before the step's first pass: a weight that was exchanged since the step before is watched no longer.
        """
        self._follow_own(self._whole())
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.norms |= norms_of(self.layers, self._own)
        self._run.clear()

    def watch_own(self) -> None:
        """Watch those weights that are whole at rest and have come to require a gradient; before each pass."""
        for name, weight in self._own.items():
            if weight.requires_grad and name not in self._own_handles:
                came = weight.register_hook(self._hook(self._add_own, name))
                accumulated = partial(_call, WeakMethod(self._accumulated), name)
                self._own_handles[name] = [came, weight.register_post_accumulate_grad_hook(accumulated)]

    @property
    def passes(self) -> int:
        """How many backward passes `grads` are the sum over; 1 where none reached a weight."""
        return max((len(ids) for ids in self._passes.values()), default=1)

    def _whole(self) -> dict[str, Tensor]:
        """The layers' own weights as they are now, but for those that are split over processes."""
        if not self.measured:
            return {}
        found: dict[str, Tensor | None] = {name: own_weight(module) for name, module in self.layers.items()}
        for name, attention in self.attentions.items():  # a layer around one such keeps the weight it was made of
            inside = {f"{name}.{local}".lstrip("."): weight for local, weight in packed_weights(attention).items()}
            found |= {layer: weight for layer, weight in inside.items() if layer in found}
        return {name: weight for name, weight in found.items() if _is_whole(weight)}

    def _follow_own(self, now: dict[str, Tensor]) -> None:
        for name in [name for name, weight in self._own.items() if now.get(name) is not weight]:
            del self._own[name]
            remove(self._own_handles.pop(name, []))
        self._own |= now
        self.watch_own()

    def _before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._note_outer()
        self._note_split(name, weight_now(module))

    def _after_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], h: Any) -> None:
        self.look(name, module._parameters.get("weight"))
        self._note_unread(h)

    def _before_attention(self, name: str, attention: nn.MultiheadAttention, args: tuple[Any, ...]) -> None:
        for local, weight in packed_weights(attention).items():
            self._note_split(f"{name}.{local}".lstrip("."), weight)

    def _after_attention(self, name: str, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(attention, nn.MultiheadAttention)
        for local, weight in packed_weights(attention).items():
            self._look_inside(name, local, weight)
        self._note_unread(output[0] if isinstance(output, tuple) else output)

    def _look_inside(self, name: str, local: str, weight: Tensor | None) -> None:
        if (layer := f"{name}.{local}".lstrip(".")) in self.layers:
            self.look(layer, weight)

    def _note_split(self, name: str, weight: Tensor | None) -> None:
        """Before the call, at whose end the layer is read unless it is split."""
        if weight is not None and _is_split(weight) and name in self.layers and self.reads():
            self._add_split(name, weight)

    def _add_split(self, name: str, weight: Any) -> None:
        self.split.add(name)
        places = zip(weight.device_mesh.get_coordinate() or (), weight.placements, strict=False)
        self.later = self.later or any(at > 0 and placement.is_shard() for at, placement in places)

    def _note_unread(self, h: Any) -> None:
        """See when a gradient comes to a call that is not read: it was in eval mode, or outside of the model's."""
        if isinstance(h, Tensor) and h.requires_grad and not (self.reads() or at_rest() or in_transform()):
            (shown(h) if layout(h) == STRIDED else h).register_hook(lambda _: self._unread.add(self._task()))

    def look(self, name: str, weight: Tensor | None) -> None:
        """Take note of the weight that a call of a layer, or of a function in its place, has used."""
        if weight is None or at_rest() or in_transform() or not self.reads():
            return
        first = name not in self._run
        self._run.add(name)
        if weight is self._own.get(name) or weight is self._seen.get(name):
            return
        if _is_split(weight):
            self._add_split(name, weight)
            return
        if not self.measured or not weight.is_floating_point():  # the codes of a quantized weight have no norms
            return
        if weight.requires_grad:  # one that is frozen is looked at in the next pass again
            self._seen[name] = weight
            self._handles.append(weight.register_hook(self._hook(self._add, name)))
        if first or name not in self.norms:  # at rest it may have been another's, as where one is generated
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self.norms |= norms_of(self.layers, {name: weight})

    def _add(self, name: str, grad: Tensor | None) -> None:
        """A gradient of a weight that is computed, or stands in the place of the layer's own for a call."""
        if name in self._own and self._generated.get(name, (-1,))[0] != self._task():
            self._generated[name] = self._task(), self.grads.get(name)
        self._sum(name, grad)

    def _add_own(self, name: str, grad: Tensor | None) -> None:
        if (task := torch._C._current_graph_task_id()) == self._task():
            self._sum_own(name, grad)
        elif grad is not None and not of_transform(grad):
            self._inside[name] = task, grad.detach()  # it may be handed to the outer pass, as in torchdiffeq's adjoint

    def _accumulated(self, name: str, weight: Tensor) -> None:
        """A gradient of a pass within another was added to `.grad`, and so is not to come in the outer one again."""
        task, grad = self._inside.pop(name, (-1, None))
        if task == torch._C._current_graph_task_id():
            self._sum_own(name, grad)

    def _sum_own(self, name: str, grad: Tensor | None) -> None:
        """A gradient of the layer's own weight; it holds those of weights made of it, which the pass gave before."""
        task, before = self._generated.pop(name, (-1, None))
        if task == self._task() and before is None:
            self.grads.pop(name, None)
        elif task == self._task() and before is not None:
            self.grads[name] = before
        self._sum(name, grad)

    def _sum(self, name: str, grad: Tensor | None) -> None:
        if grad is None or at_rest() or of_transform(grad):
            return
        if (task := self._task()) in self._unread and task not in self._read:
            return
        held = self.grads.get(name)
        self.grads[name] = grad.detach().clone() if held is None else widened(held) + grad.detach()
        self._passes[name].add(task)

    def note_read(self) -> None:
        """A gradient has come to a layer's output that is read; those of the weights follow it."""
        self._read.add(self._task())

    def _task(self) -> int:
        """The backward pass that runs, the outermost of several."""
        return (self._outer or [torch._C._current_graph_task_id()])[0]

    @staticmethod
    def _hook(function: Callable[..., None], name: str) -> Callable[[Tensor], None]:
        """A hook of a weight; a process that the weight is sent to goes without it, which torch needs no warning of."""
        hook: Callable[[Tensor], None] = unserializable_hook(partial(apart, function, name))
        return hook

    def _note_outer(self) -> None:
        """Remember the backward pass around, as long as it runs: those inside it are parts of it, not passes more."""
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._outer:
            self._outer.append(task)
            Variable._execution_engine.queue_callback(partial(self._outer.remove, task))


def _call(method: WeakMethod[Callable[[str, Tensor], None]], name: str, weight: Tensor) -> None:
    """Weakly: the garbage collector does not see a weight's hooks of this kind, nor so the cycle that they close."""
    if (accumulated := method()) is not None:
        accumulated(name, weight)


def _is_whole(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether this is a parameter that holds a weight matrix; a process's part of a sharded one is split, or flat."""
    if not isinstance(weight, nn.Parameter) or _is_split(weight):
        return False
    return weight.is_floating_point() and weight.ndim > 1


def _is_split(weight: Tensor) -> bool:
    """Whether this is a DTensor; without importing them, which takes torch.distributed."""
    return hasattr(weight, "placements")
