"""CIFAR ResNets of depth 6n + 2: three stages of n basic blocks (arXiv:1512.03385, sec. 4.2).

Variants are keywords: `norm=False` leaves out every BatchNorm of the body, `shortcut=False` gives the VGG-style
net, `projection=True` option-B shortcuts, `last_bn=True` puts one BatchNorm1d before the last linear
layer (arXiv:2002.10801).
Parameters, 10 classes:  20: 0.27M   56: 0.85M   110: 1.73M   1202: 19.4M
Shapes: B images, C channels, H x W pixels, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from condzoo.models.head import attach_head, check_sizes
from condzoo.models.initializers import init_weights
from condzoo.models.registry import register_table
from condzoo.models.staged import StagedNetwork

WIDTHS = (16, 32, 64)


def blocks_per_stage(depth: int) -> int:
    """n of a CIFAR network of depth 6n + 2.

    Raises:
        ValueError: no n >= 1 gives this depth; the message names the nearest depths that exist.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        nearest = f"nearest are {6 * n + 2} and {6 * n + 8}" if n >= 1 else "the smallest is 8"
        raise ValueError(f"depth must be 6n + 2, got {depth}; {nearest}")
    return n


def init_convolutions(model: nn.Module) -> None:
    """He-normal over fan-out for every convolution, the family's own initializer; on the meta device nothing."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and not m.weight.is_meta:
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class OptionAShortcut(nn.Module):
    """The shortcut without parameters: every second position, the new channels zero (option A of He et al.).

    Pooling over one position picks it exactly, and its gradient keeps the memory format. That of a slice is always in
    the default layout: in a channels_last network the ReLU and BatchNorm before it then read two layouts at once,
    which is slow on a CPU (docs/training.md).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = c_out - c_in

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.new_channels))


def build_shortcut(c_in: int, c_out: int, stride: int, norm: bool, projection: bool) -> nn.Module:
    """The way around a block: as it is where nothing changes size, else option A, or option B's 1x1 convolution."""
    if c_in == c_out and stride == 1:
        return nn.Identity()
    if not projection:
        return OptionAShortcut(c_in, c_out, stride)
    convolution = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out) if norm else nn.Identity())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the second's output added to the shortcut unless `shortcut` is False."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: bool, shortcut: bool, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = build_shortcut(c_in, c_out, stride, norm, projection) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]
        h = self.relu1(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu2(h if self.shortcut is None else h + self.shortcut(x))


class CifarResNet(StagedNetwork):
    """A CIFAR ResNet, or its VGG-style twin.

    Args:
        depth: 6n + 2, counting convolutions and the classifier.
        norm: BatchNorm after every convolution.
        shortcut: False gives the VGG-style net, the same without shortcuts.
        projection: shortcuts that change size are 1x1 convolutions (option B of He et al., with a BatchNorm of their
            own where the body has them) in place of option A, which has no parameters.
        last_bn: one BatchNorm1d between pooling and dropout; `last_bn_init`: its gamma, "ones" or "uniform".
        num_classes: 0 returns the pooled features.
        drop_rate: dropout before the classifier.
        init: a scheme of `init_weights` in place of the family's own (convolutions He-normal over fan-out,
            classifier U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with zero bias).

    Raises:
        ValueError: a depth that is not 6n + 2, `projection` without shortcuts, `num_classes` below 0,
            `in_chans` below 1, an unknown `init`.
    """

    def __init__(
        self,
        depth: int,
        norm: bool = True,
        shortcut: bool = True,
        last_bn: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        init: str | None = None,
        last_bn_init: str = "ones",
        projection: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_chans)
        if projection and not shortcut:
            raise ValueError("projection=True is a kind of shortcut, and this network has none (shortcut=False)")
        n = blocks_per_stage(depth)
        self.in_chans, self.has_norm, self.has_shortcut = in_chans, norm, shortcut
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0]) if norm else nn.Identity()
        self.relu1 = nn.ReLU(inplace=True)
        c_in = WIDTHS[0]
        for stage, c in enumerate(WIDTHS, start=1):
            blocks = [BasicBlock(c_in, c, 2 if c > c_in else 1, norm, shortcut, projection)]
            blocks += [BasicBlock(c, c, 1, norm, shortcut, projection) for _ in range(n - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            c_in = c
        self.feature_info = [dict(num_chs=c, reduction=2**i, module=f"layer{i + 1}") for i, c in enumerate(WIDTHS)]
        init_convolutions(self)
        attach_head(self, c_in, num_classes, global_pool, drop_rate, last_bn, last_bn_init)
        if init is not None:
            init_weights(self, init)

    def forward_stem(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 16, H, W]
        """Convolution, BN, ReLU."""
        return self.relu1(self.bn1(self.conv1(x)))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups: the stem, then each stage (coarse) or block."""
        return dict(stem=r"^conv1|^bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")


register_table(__name__, "cifar_resnet", CifarResNet, first_conv="conv1")
