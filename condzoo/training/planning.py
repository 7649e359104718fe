"""What a training will take, from the network itself on the meta device: nothing is computed, no memory is used."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from condzoo.data import IMAGE_FOLDER, batches_per_epoch
from condzoo.data.holding_out import held_out_count
from condzoo.training.accelerators import Accelerator
from condzoo.training.data_sets import STORED, class_count, image_shape, read_data
from condzoo.training.networks import freeze, network_of
from condzoo.training.optimizers import build_optimizer
from condzoo.training.parts import check_parts
from condzoo.training.precision import check_precision, resolve_precision, usual_torch
from condzoo.training.schema import FullBatch, Recipe

TRAINING_IMAGES = {"digits": 1437, "mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}
TEST_IMAGES = {"digits": 360, "mnist": 10_000, "fashion_mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000}
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000  # ILSVRC 2012
PASSES = 6  # over what backward needs: written and read forward, read with its gradient, which is written and read


@dataclass(frozen=True)
class Traced:
    """One forward and backward pass over some images, and an optimizer step, as the network says it."""

    flops_forward: int
    flops: int  # forward and backward; a multiply-add counts two
    operations: int
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    convolutional: bool


@dataclass(frozen=True)
class Plan:
    """What a training takes on `count` devices. Bytes are of one of them; times are estimates."""

    device: str
    count: int
    reached: float
    reached_bandwidth: float
    precision: str
    model: str
    parameters: int
    trainable: int
    training_images: int
    images_per_step: int
    images_per_pass: int  # on one device, of accumulated batches one part
    steps_per_epoch: int
    steps: int
    flops_forward_per_image: float
    flops_per_step: float
    flops: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    data_bytes: int
    memory_bytes: int
    device_memory_bytes: float
    communicated_bytes_per_step: float
    seconds_per_step: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {key: value if value != math.inf else None for key, value in asdict(self).items()}


@usual_torch()
def plan_training(
    recipe: Recipe,
    device: Accelerator,
    count: int = 1,
    *,
    data_root: str | Path | None = None,
    max_steps: int | None = None,
) -> Plan:
    """Estimate a training without running it.

    FLOPs count matrix products and convolutions. Activations are the storages that autograd keeps for backward,
    of one pass; with 16-bit precision half of their float32 size. Communication is that of a ring all-reduce of
    the gradient, 2 (N - 1) / N of its bytes a step and device. Time is `Accelerator.time_of` each pass, the update
    and the communication one after the other; evaluation, probe, data loading and checkpoints are not in it.

    Args:
        recipe: checked.
        device, count: on what, and how many of them (data parallel).
        data_root: only class folders are looked at, to count their images; see `data_size`.
        max_steps: as for `train`.

    Raises:
        ValueError: fewer images in a batch than devices; no whole batch in an epoch; no image left by data.validation;
            a single image for a BatchNorm; fp16 on a CPU.
    """
    check_precision(recipe, device.kind)
    batch = recipe.data.batch_size
    if count < 1 or batch < count:
        raise ValueError(f"gpus: got {count}, must be from 1 to data.batch_size ({batch})")
    images, classes = data_size(recipe, data_root)
    full_batch = isinstance(recipe.optim, FullBatch)
    if full_batch:
        per_step, per_epoch, passes = images, 1, math.ceil(images / batch)
        in_pass = math.ceil(min(batch, images) / count)
    else:
        per_epoch = batches_per_epoch(images, batch, recipe.data.drop_last)
        per_step, passes = min(batch, images), recipe.accumulate
        in_pass = math.ceil(per_step / count / recipe.accumulate)
    check_parts(recipe, images, classes, count)
    traced = trace(recipe, classes, in_pass)
    steps = min(recipe.iterations or (recipe.epochs or 0) * per_epoch, max_steps or math.inf)
    half = resolve_precision(recipe, traced.convolutional, device.bf16) != "fp32"
    activations = traced.activation_bytes // (2 if half else 1)
    communicated = 2 * (count - 1) / count * traced.gradient_bytes
    update = 2 * (traced.parameter_bytes + traced.gradient_bytes + traced.optimizer_bytes)
    seconds = passes * device.time_of(traced.flops, PASSES * activations, traced.operations, half)
    seconds += update / (device.reached_bandwidth * device.bandwidth) + communicated / device.link
    per_image = traced.flops / in_pass
    epochs, rest = divmod(int(steps), per_epoch)
    seen = epochs * min(per_epoch * per_step, images) + rest * per_step  # the last batch of an epoch may be smaller
    average = traced.parameter_bytes + traced.buffer_bytes if recipe.ema else 0
    resident = images_in_memory(recipe.data.name) * math.prod(image_shape(recipe.data))
    weights = traced.parameter_bytes + traced.buffer_bytes
    held = weights + traced.gradient_bytes + traced.optimizer_bytes + average + activations + resident
    return Plan(
        device=device.name,
        count=count,
        reached=device.reached,
        reached_bandwidth=device.reached_bandwidth,
        precision="16-bit" if half else "float32",
        model=recipe.model.name,
        parameters=traced.parameter_bytes // 4,
        trainable=traced.gradient_bytes // 4,
        training_images=images,
        images_per_step=per_step,
        images_per_pass=in_pass,
        steps_per_epoch=per_epoch,
        steps=int(steps),
        flops_forward_per_image=traced.flops_forward / in_pass,
        flops_per_step=per_image * per_step,
        flops=per_image * seen,
        weight_bytes=weights,
        gradient_bytes=traced.gradient_bytes,
        optimizer_bytes=traced.optimizer_bytes,
        average_bytes=average,
        activation_bytes=activations,
        data_bytes=resident,
        memory_bytes=held,
        device_memory_bytes=device.memory,
        communicated_bytes_per_step=communicated,
        seconds_per_step=seconds,
        seconds=seconds * steps,
    )


def images_in_memory(name: str) -> int:
    """How many images of a data set each device holds, those of every split; 0 where they stay on disk."""
    return 0 if name in STORED else TRAINING_IMAGES[name] + TEST_IMAGES[name]


def data_size(recipe: Recipe, data_root: str | Path | None) -> tuple[int, int]:
    """(training images, classes); those of class folders are counted, those of the other sets are known.

    Class folders that are not here are taken for ImageNet where the recipe says that they have its classes: a
    training can be planned where it is not going to run.

    Raises:
        ValueError: data.validation holds out none or all.
        FileNotFoundError: no class folders, and not taken for ImageNet.
    """
    images, classes = TRAINING_IMAGES.get(recipe.data.name), class_count(recipe.data)
    if images is None:
        try:
            data = read_data(recipe, data_root)
            return data.size("train"), data.num_classes
        except FileNotFoundError:
            if (recipe.data.name, classes) != (IMAGE_FOLDER, IMAGENET_CLASSES):
                raise
            images = IMAGENET_IMAGES
    validation = recipe.data.validation
    held_out = 0 if validation is None else held_out_count(images, validation)
    return images - held_out, classes or 0


def trace(recipe: Recipe, num_classes: int, images: int) -> Traced:
    """Count one forward and backward pass over `images` images, and an optimizer step, on the meta device."""
    with torch.device("meta"):
        model = network_of(recipe.model, image_shape(recipe.data), num_classes).train()
        freeze(model, recipe.freeze)
        x = torch.empty(images, *image_shape(recipe.data))
        y = torch.zeros(images, dtype=torch.int64)
    optimizer = build_optimizer(recipe.optim, model)
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with both, OperationCounter() as counter:
        with forward:
            loss, saved = kept_for_backward(model, lambda: nn.functional.cross_entropy(model(x), y))
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    state = [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
    return Traced(
        flops_forward=forward.get_total_flops(),
        flops=both.get_total_flops(),
        operations=counter.count,
        parameter_bytes=sum(p.nbytes for p in model.parameters()),
        buffer_bytes=sum(b.nbytes for b in model.buffers()),
        gradient_bytes=sum(g.nbytes for g in gradients),
        optimizer_bytes=sum(s.nbytes for s in state if s.ndim),
        activation_bytes=saved,
        convolutional=any(isinstance(module, nn.Conv2d) for module in model.modules()),
    )


def kept_for_backward(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """(loss(), bytes of the storages autograd keeps for its backward pass, the model's own left out)."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their storages, so that none is counted for another

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    return value, sum(t.untyped_storage().nbytes() for number, t in kept.items() if number not in own)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that compute something: about what a GPU is given to start."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
