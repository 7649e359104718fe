"""The validation split: training images that are held out, the same share of each class."""

import numpy as np
import torch

from condzoo.data.counter_random import derived_seed

# The same images for every seed of a recipe, so that its runs are compared on one validation set.
SPLIT_SEED = derived_seed(0x5EED)


def held_out_count(images: int, validation: int | float) -> int:
    """How many of so many training images are held out.

    Raises:
        ValueError: none or all would be.
    """
    count = round(validation * images) if validation < 1 else int(validation)
    if not 0 < count < images:
        raise ValueError(
            f"data.validation: {validation:g} holds out {count} of {images} training images; it must hold out at least "
            "one and leave at least one"
        )
    return count


def held_out(labels: np.ndarray, validation: int | float) -> tuple[np.ndarray, np.ndarray]:
    """(positions that stay, positions that are held out), each ascending; a function of its arguments alone.

    Args:
        labels: [n] class numbers of the training images.
        validation: the share held out (under 1), or their number (1 or more, whole). Every class gives its share,
            rounded so that the number is met (largest remainders first), and keeps an image where the number allows.

    Raises:
        ValueError: none or all would be held out.
    """
    n = len(labels)
    count = held_out_count(n, validation)
    _, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / n)
    quotas = np.floor(exact + 1e-9).astype(int)  # a share of 0.1 of 10 images is 1, whatever round-off says
    most = sizes - 1 if count <= n - len(sizes) else sizes  # a class that is held out whole cannot be learned
    while (missing := count - quotas.sum()) > 0:  # once, unless classes of one image have no share to give
        able = np.flatnonzero(quotas < most)
        short = able[np.argsort((quotas - exact)[able], kind="stable")[:missing]]
        quotas[short] += 1
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(n, generator=generator, device="cpu").numpy()
    by_class = order[np.argsort(labels[order], kind="stable")]  # once: a pass for every class takes minutes at ImageNet
    starts = np.cumsum(sizes) - sizes
    taken = [by_class[start : start + quota] for start, quota in zip(starts, quotas, strict=True)]
    chosen = np.zeros(n, dtype=bool)
    chosen[np.concatenate(taken)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
