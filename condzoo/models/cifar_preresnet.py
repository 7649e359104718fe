"""Pre-activation ResNets for CIFAR, depth 6n + 2 (arXiv:1603.05027); the ImageNet ones are in imagenet_resnet.py.

The first block of every stage applies BN-ReLU before the fork, so its shortcut too sees the activated input.
`final_norm=False` leaves the last BN of the body out and keeps its ReLU; `last_bn=True` puts one BatchNorm1d
before the last linear layer (arXiv:2002.10801).
Parameters, 10 classes:  20: 0.27M   56: 0.85M   110: 1.73M   1202: 19.4M
Shapes: B images, C channels, H x W pixels, K classes.
"""

from torch import Tensor, nn

from condzoo.models.cifar_resnet import WIDTHS, OptionAShortcut, blocks_per_stage, init_convolutions
from condzoo.models.head import attach_head, check_sizes
from condzoo.models.initializers import init_weights
from condzoo.models.registry import register_table
from condzoo.models.staged import StagedNetwork


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice (`basic`) or three times, added to the shortcut.

    Args:
        c_in, c: channels that come in, and of the 3x3 convolutions; a bottleneck puts out 4c.
        first: the first block of a stage: its shortcut sees the activated input and changes size where needed,
            without parameters (`option_a`) or by a 1x1 convolution.
    """

    def __init__(self, c_in: int, c: int, stride: int, first: bool, bottleneck: bool, option_a: bool) -> None:
        super().__init__()
        c_out = 4 * c if bottleneck else c
        self.first = first
        self.bn1, self.relu1 = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
            self.bn2, self.relu2 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
            self.bn3, self.relu3 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
            self.conv3 = nn.Conv2d(c, c_out, 1, bias=False)
            self.branch: tuple[str, ...] = ("conv1", "bn2", "relu2", "conv2", "bn3", "relu3", "conv3")
        else:
            self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
            self.bn2, self.relu2 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
            self.branch = ("conv1", "bn2", "relu2", "conv2")
        if c_in == c_out and stride == 1:
            self.shortcut: nn.Module = nn.Identity()
        elif option_a:
            self.shortcut = OptionAShortcut(c_in, c_out, stride)
        else:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]
        h = self.relu1(self.bn1(x))
        residual = self.shortcut(h if self.first else x)
        for name in self.branch:
            h = getattr(self, name)(h)
        return h + residual


class PreResNet(StagedNetwork):
    """A pre-activation ResNet: stem, stages of `PreActBlock`s, final BN and ReLU, head.

    Args:
        blocks: blocks of each stage; `widths`: channels of each stage's 3x3 convolutions.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions in place of two 3x3.
        imagenet_stem: a strided 7x7 convolution and max-pooling in place of a 3x3 convolution; shortcuts that
            change size are then 1x1 convolutions (option B).
        final_norm: the BN after the last block; its ReLU stays in any case.
        last_bn, num_classes, in_chans, global_pool, drop_rate, init, last_bn_init: as for `CifarResNet`.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        bottleneck: bool = False,
        imagenet_stem: bool = False,
        final_norm: bool = True,
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
        self.in_chans, self.final_norm = in_chans, final_norm
        c_in = widths[0]
        if imagenet_stem:
            self.conv1 = nn.Conv2d(in_chans, c_in, 7, 2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_chans, c_in, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.feature_info = []
        for i, (n, c) in enumerate(zip(blocks, widths, strict=True)):
            c_out, stage = 4 * c if bottleneck else c, []
            for block in range(n):
                stride = 2 if i > 0 and block == 0 else 1
                stage.append(PreActBlock(c_in, c, stride, block == 0, bottleneck, option_a=not imagenet_stem))
                c_in = c_out
            name, reduction = f"layer{i + 1}", (4 if imagenet_stem else 1) * 2**i
            self.add_module(name, nn.Sequential(*stage))
            self.feature_info.append(dict(num_chs=c_in, reduction=reduction, module=name))
        self.norm = nn.BatchNorm2d(c_in) if final_norm else nn.Identity()
        self.relu: nn.Module = nn.ReLU()  # not in place: without final BN it would overwrite the last stage's features
        init_convolutions(self)
        attach_head(self, c_in, num_classes, global_pool, drop_rate, last_bn, last_bn_init)
        if init is not None:
            init_weights(self, init)

    def forward_stem(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 16, H, W], or [B, 64, H/4, W/4]
        """Convolution and, for ImageNet, max-pooling."""
        return self.maxpool(self.conv1(x))

    def forward_tail(self, x: Tensor) -> Tensor:  # [B, D, H', W'] -> [B, D, H', W']
        """The final BN and ReLU."""
        return self.relu(self.norm(x))

    def drop_tail(self) -> None:
        """Leave out the final BN and ReLU."""
        self.norm, self.relu = nn.Identity(), nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """timm's parameter groups: the stem, then each stage (coarse) or block, the final BN with the last."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return dict(stem=r"^conv1", blocks=[(blocks, None), (r"^norm", (99999,))])


def build_cifar_preresnet(depth: int, **kwargs: object) -> PreResNet:
    """A CIFAR PreResNet of depth 6n + 2; ValueError for another depth."""
    return PreResNet(blocks=(blocks_per_stage(depth),) * 3, widths=WIDTHS, **kwargs)  # type: ignore[arg-type]


register_table(__name__, "cifar_preresnet", build_cifar_preresnet, first_conv="conv1")
