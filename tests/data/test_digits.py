"""The embedded digits against scikit-learn's copy."""

import numpy as np
import pytest
import torch

from condzoo.data import load_data
from condzoo.data.digits import load_digits


def test_digits_equal_scikit_learns() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = load_digits()
    ours = torch.cat([train.images, test.images]).squeeze(1)
    labels = torch.cat([train.labels, test.labels])
    theirs = torch.from_numpy(np.round(source.images * (255 / 16))).to(torch.uint8)
    as_rows = {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(ours, labels, strict=True)}
    assert as_rows == {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(theirs, source.target, strict=True)}
    assert len(ours) == len(theirs) == 1797


def test_split_is_the_documented_one() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    source = pytest.importorskip("sklearn.datasets").load_digits()
    _, chosen = selection.train_test_split(np.arange(1797), test_size=360, stratify=source.target, random_state=0)
    _, test = load_digits()
    np.testing.assert_array_equal(test.labels.numpy(), source.target[np.sort(chosen)])


def test_split_is_stratified() -> None:
    train, test = load_digits()
    assert (len(train), len(test)) == (1437, 360)
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert (share - 360 / 1797).abs().max() < 0.005


def test_digits_resize() -> None:
    data = load_data("digits", resize=16)
    assert data.image_shape == (1, 16, 16)
    assert data.train.images.max() > 240
