"""VGG-style networks for CIFAR.

`cifar_vgg{depth}`: the CIFAR ResNet without its shortcuts (arXiv:2002.10801, fig. VIII), so plain 3x3 convolutions.
`cifar_vgg16`: five groups of three 3x3 convolutions with BN, max-pooling after each group (fig. XII); its groups
are `group1` ... `group5` and can be frozen one by one.
Parameters, 10 classes:  vgg20: 0.27M   vgg110: 1.73M   vgg16: 14.9M
Shapes: B images, C channels, H x W pixels, K classes.
"""

from timm.models import checkpoint
from torch import Tensor, nn

from condzoo.models.cifar_resnet import CifarResNet, init_convolutions
from condzoo.models.head import attach_head, check_sizes
from condzoo.models.initializers import init_weights
from condzoo.models.registry import register_table
from condzoo.models.staged import StagedNetwork

GROUP_WIDTHS = (64, 128, 256, 512, 512)
CONVS_PER_GROUP = 3


def conv_group(c_in: int, c: int) -> nn.Sequential:
    """Three 3x3 convolutions with BN and ReLU, then 2x2 max-pooling."""
    layers: list[nn.Module] = []
    for i in range(CONVS_PER_GROUP):
        layers += [nn.Conv2d(c_in if i == 0 else c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class CifarVgg16(StagedNetwork):
    """Fifteen 3x3 convolutions in five groups, and one linear layer.

    Args: as for `CifarResNet`. Inputs smaller than 32 x 32 are pooled away: the five max-poolings need 32 pixels.
    """

    def __init__(
        self,
        last_bn: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        init: str | None = None,
        last_bn_init: str = "ones",
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_chans)
        self.in_chans = in_chans
        c_in = in_chans
        for i, c in enumerate(GROUP_WIDTHS, start=1):
            self.add_module(f"group{i}", conv_group(c_in, c))
            c_in = c
        self.feature_info = [
            dict(num_chs=c, reduction=2 ** (i + 1), module=f"group{i + 1}") for i, c in enumerate(GROUP_WIDTHS)
        ]
        init_convolutions(self)
        attach_head(self, c_in, num_classes, global_pool, drop_rate, last_bn, last_bn_init)
        if init is not None:
            init_weights(self, init)

    def forward_checkpointed(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A group that is recomputed in backward as a whole."""
        return checkpoint(stage, x)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups: the first convolution, then each group (coarse) or layer."""
        return dict(stem=r"^group1\.0", blocks=r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)")


register_table(__name__, "cifar_vgg", CifarResNet, first_conv="conv1")
register_table(__name__, "cifar_vgg16", CifarVgg16, first_conv="group1.0")
