"""The embedded data set: 1,797 handwritten digits of 8x8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0; the test half of it, as scikit-learn ships it
(`sklearn.datasets.load_digits`). `digits.npz` keeps scikit-learn's order and values (0 to 16, as uint8).

Split: 1,437 train and 360 test images, stratified by class, fixed in the file as `test`; made by
`sklearn.model_selection.train_test_split(range(1797), test_size=360, stratify=labels, random_state=0)`.
"""

from importlib.resources import files

import numpy as np
import torch

from condzoo.data.arrays import LabelledImages

LARGEST_VALUE = 16  # pixels count the set bits of a 4x4 block


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """(train, test), images [n, 1, 8, 8] with the values 0..16 spread over 0..255."""
    with files("condzoo.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        images, labels, test = (torch.from_numpy(stored[key]) for key in ("images", "labels", "test"))
    images = (images.float() * (255 / LARGEST_VALUE)).round().to(torch.uint8).unsqueeze(1)
    labels = labels.long()
    return LabelledImages(images[~test], labels[~test]), LabelledImages(images[test], labels[test])
