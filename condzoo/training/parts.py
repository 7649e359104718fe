"""What a process sees of a batch at once: whether BatchNorm has a variance of it, and the network runs on nothing."""

import contextlib

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from condzoo.training.data_sets import image_shape
from condzoo.training.networks import network_of
from condzoo.training.schema import FullBatch, Recipe


def check_parts(recipe: Recipe, images: int, num_classes: int, processes: int) -> None:
    """See that the network can take what each process sees of each batch.

    A norm that gets one value a channel, from a single image where its map is a pixel, has no variance. A process that
    gets no image of a batch runs the network on none, since the others wait for its gradient; not every network can,
    and torch's SyncBatchNorm under autocast sends zeros of another dtype than the others send: they hang, or get noise.

    Args:
        recipe: checked.
        images: in the training set.
        num_classes: of the data.
        processes: that train together.

    Raises:
        ValueError: it could not, in some step of the run.
    """
    if sees_no_image(recipe, images, processes):
        fault = "sync_bn needs some of each" if recipe.sync_bn else fault_without_images(recipe, num_classes)
        if fault:
            raise ValueError(
                f"data.batch_size: got {recipe.data.batch_size}, with which one of {processes} processes sees no image "
                f"at the end of an epoch of {images}, and {recipe.model.name} cannot run on none ({fault}); take "
                "another, drop_last = true, or fewer processes"
            )
    if not sees_single_image(recipe, images, processes):
        return
    norm = norm_without_variance(recipe, num_classes)
    if norm is not None:
        size = recipe.data.batch_size
        raise ValueError(
            f"data.batch_size: got {size}, with which one of {processes} process(es) sees a single image at a time "
            f"(of {images}, accumulate = {recipe.accumulate}), and {norm} has no variance of one; take another, "
            "drop_last = true, or less accumulation"
        )


def sees_single_image(recipe: Recipe, images: int, processes: int) -> bool:
    """Whether a process takes one image alone: of a batch, of a part that is accumulated, of an epoch's last batch.

    With SyncBatchNorm its statistics are of the other processes' images, too, one of each at least.
    """
    if recipe.sync_bn and processes > 1:
        return False
    batches = batch_sizes(recipe, images)
    mine = {part for batch in batches for part in (batch // processes, -(-batch // processes))} - {0}
    pieces = {part: -(-part // recipe.accumulate) for part in mine}
    return any(1 in (piece, part % piece) for part, piece in pieces.items())


def sees_no_image(recipe: Recipe, images: int, processes: int) -> bool:
    """Whether a process takes no image of a batch that the others take some of."""
    return any(batch < processes for batch in batch_sizes(recipe, images))


def batch_sizes(recipe: Recipe, images: int) -> set[int]:
    """How many images a batch of the run may have, over all processes."""
    size = recipe.data.batch_size
    full, rest = divmod(images, size)
    batches = {size} if full else set()
    never_so_far = recipe.iterations is not None and recipe.iterations <= full
    if isinstance(recipe.optim, FullBatch) or not (recipe.data.drop_last or never_so_far):
        batches.add(rest)
    return batches - {0}


def fault_without_images(recipe: Recipe, num_classes: int) -> str | None:
    """The error of a network that cannot run on no image; None where there is no error.

    Not by shapes alone: on the meta device torch cannot scale no image up (`nearest`), which it can elsewhere.
    """
    shape = image_shape(recipe.data)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = network_of(recipe.model, shape, num_classes).train()
        try:
            model(torch.empty(0, *shape))
        except Exception as error:
            return str(error).partition("\n")[0] or type(error).__name__
    return None


def norm_without_variance(recipe: Recipe, num_classes: int) -> str | None:
    """The first BatchNorm that gets one value a channel from an image, seen by shapes alone; None where none does."""
    shape = image_shape(recipe.data)
    found: list[str] = []

    def look(name: str, x: Tensor) -> None:
        if x.numel() == 2 * x.shape[1]:  # of two images
            found.append(name)

    with torch.device("meta"):
        model = network_of(recipe.model, shape, num_classes).train()
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
        # A network that looks at values, of which the meta device has none, is judged as far as it comes.
        with torch.no_grad(), contextlib.suppress(Exception):
            model(torch.empty(2, *shape))
    return found[0] if found else None
