"""Under another default device, as a notebook sets it: "meta" has no numbers, so that what lands there is an error."""

import pytest
import torch

from condzoo import verify_checkpoint
from condzoo.checkpoints import verify_released


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_good_checkpoint_is_good(checkpoint, index, elsewhere):
    for verification in (verify_checkpoint(checkpoint), *verify_released()):
        assert verification.ok, verification.rows
        assert torch.empty(1).is_meta
