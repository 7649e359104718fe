"""What a run writes down of the machine and the packages that it ran on."""

import PIL
import torch

from condzoo.training.environment import describe_environment
from condzoo.training.precision import Numerics


def test_the_packages_that_decode_images_are_among_them() -> None:
    packages = describe_environment(Numerics("fp32", False, torch.device("cpu")))["packages"]
    assert packages["pillow"] == PIL.__version__
    assert "datasets" in packages
