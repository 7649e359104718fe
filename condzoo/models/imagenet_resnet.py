"""ImageNet ResNets with a BatchNorm before the last linear layer (arXiv:2002.10801), and PreResNets.

`resnet{depth}_lastbn` is timm's own ResNet plus `last_bn`: its state dict is torchvision's and timm's plus
`last_bn.*`, and the plain weights load into it. `preresnet{depth}` is the pre-activation network
(arXiv:1603.05027) with 1x1 convolutions where a shortcut changes size.
Parameters, 1000 classes:  resnet18_lastbn: 11.7M   resnet50_lastbn: 25.6M
Shapes: B images, C channels, H x W pixels, K classes.
"""

import inspect
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from condzoo.models.cifar_preresnet import PreResNet
from condzoo.models.head import attach_head, check_sizes, drop_head, forward_head, set_classifier
from condzoo.models.initializers import init_weights
from condzoo.models.registry import register_table

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
WIDTHS = (64, 128, 256, 512)
PRERESNET_DEPTHS = (18, 50)
USUAL = {name: parameter.default for name, parameter in inspect.signature(ResNet).parameters.items()}
REGULARIZERS = ("drop_path_rate", "drop_block_rate")


def check_depth(depth: int, allowed: tuple[int, ...]) -> None:
    """ValueError, naming the nearest, for a depth that is not among `allowed`."""
    if depth not in allowed:
        nearest = min(allowed, key=lambda d: abs(d - depth))
        raise ValueError(f"depth must be one of {', '.join(map(str, allowed))}, got {depth}; nearest is {nearest}")


class ResNetLastBN(ResNet):
    """timm's ResNet with one BatchNorm1d between pooling and dropout.

    Args:
        depth: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks; the stride on the 3x3 convolution).
        zero_init_last: gamma of each block's last BN starts at 0. Off here, as in the authors' code; timm's
            plain ResNet has it on.
        num_classes, in_chans, global_pool, drop_rate, init, last_bn_init: as for `CifarResNet`.
        **resnet_kwargs: timm's ResNet's other arguments (drop_path_rate, output_stride ...).

    Raises:
        ValueError: another depth, `num_classes` below 0, `in_chans` below 1, an unknown `init`.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        zero_init_last: bool = False,
        init: str | None = None,
        last_bn_init: str = "ones",
        **resnet_kwargs: Any,
    ) -> None:
        check_sizes(num_classes, in_chans)
        check_depth(depth, tuple(BLOCKS))
        super().__init__(
            Bottleneck if depth >= 50 else BasicBlock,  # type: ignore[arg-type]  # timm means the class
            BLOCKS[depth],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            zero_init_last=zero_init_last,
            **resnet_kwargs,
        )
        attach_head(self, self.num_features, num_classes, global_pool, drop_rate, True, last_bn_init)
        # what makes it another network than the registered one, for who builds its like again
        self.other_arguments = {
            name: value for name, value in resnet_kwargs.items() if name not in REGULARIZERS and value != USUAL[name]
        } | ({"zero_init_last": True} if zero_init_last else {})
        if init is not None:
            init_weights(self, init)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # [B, D, H', W'] -> [B, K]
        """Pooling, last BN, dropout, classifier; `pre_logits` stops before the classifier."""
        return forward_head(self, x, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; the last BN stays."""
        set_classifier(self, num_classes, global_pool)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; the last BN goes with the classifier."""
        classifier = self.fc
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.fc is not classifier:
            drop_head(self, self.num_features)
        return taken


def build_imagenet_preresnet(depth: int, **kwargs: object) -> nn.Module:
    """An ImageNet PreResNet of depth 18 or 50; ValueError for another."""
    check_depth(depth, PRERESNET_DEPTHS)
    return PreResNet(BLOCKS[depth], WIDTHS, bottleneck=depth >= 50, imagenet_stem=True, **kwargs)  # type: ignore[arg-type]


register_table(__name__, "imagenet_resnet", ResNetLastBN, first_conv="conv1")
register_table(__name__, "imagenet_preresnet", build_imagenet_preresnet, first_conv="conv1")
