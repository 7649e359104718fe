"""Rectifier MLPs: `mlp{layers}x{width}`, the networks of the paper's figures I-VII, XI and XIII.

`layers` counts linear layers; the last is the classifier. `norm=True` puts BatchNorm between each hidden linear
layer and its ReLU (the linear layer then has no bias, as BN's beta takes its place); `last_bn=True` puts one
BatchNorm1d before the classifier.
Parameters:  8x24 on 12x12 pixels: 7,330   20x256 on 28x28 pixels: 1.4M   100x256: 6.7M
Shapes: B images, C channels, H x W pixels, D = width, K classes.
"""

import itertools
import math
from collections import OrderedDict

from timm.models import checkpoint
from torch import Tensor, fx, nn

from condzoo.models.head import attach_head, check_input_size, check_sizes, set_classifier
from condzoo.models.initializers import init_weights
from condzoo.models.registry import register_table
from condzoo.models.staged import StagedNetwork

fx.wrap("check_images")  # a traced network calls it as it is


def hidden_layer(d_in: int, d_out: int, norm: bool, bias: bool) -> nn.Sequential:
    """Linear, BN where asked for, ReLU."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(d_in, d_out, bias=bias and not norm))
    if norm:
        parts["bn"] = nn.BatchNorm1d(d_out)
    parts["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)


class MLP(StagedNetwork):
    """A rectifier MLP on flattened images.

    Args:
        layers: linear layers, the classifier included; at least 2.
        width: units of every hidden layer.
        bias: False leaves out every bias, the classifier's too (Theorems 1 and 2).
        input_size: (C, H, W) of the images; `in_chans`, where given, replaces its C.
        norm, last_bn, num_classes, drop_rate, init, last_bn_init: as for `CifarResNet`. The family's own
            initializer is `random`: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases zero.

    Raises:
        ValueError: fewer than 2 layers, a width or an input size below 1, a `global_pool` (there is nothing to pool).
    """

    spatial = False  # the head's input is a vector, whatever the pooling

    def __init__(
        self,
        layers: int,
        width: int,
        norm: bool = False,
        last_bn: bool = False,
        bias: bool = True,
        input_size: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        in_chans: int | None = None,
        global_pool: str = "",
        drop_rate: float = 0.0,
        init: str | None = None,
        last_bn_init: str = "ones",
    ) -> None:
        super().__init__()
        check_input_size(input_size)
        c, height, pixels = input_size
        in_chans = c if in_chans is None else in_chans
        check_sizes(num_classes, in_chans)
        check_mlp(layers, width, global_pool)
        self.in_chans, self.bias, self.has_norm = in_chans, bias, norm
        self.input_size = (in_chans, height, pixels)
        self.flatten = nn.Flatten()
        sizes = [math.prod(self.input_size)] + [width] * (layers - 1)
        self.layers = nn.Sequential(*(hidden_layer(i, o, norm, bias) for i, o in itertools.pairwise(sizes)))
        self.feature_info = [dict(num_chs=width, reduction=1, module=f"layers.{i}") for i in range(layers - 1)]
        attach_head(self, width, num_classes, "", drop_rate, last_bn, last_bn_init)
        self._match_bias()
        init_weights(self, "random")
        if init is not None:
            init_weights(self, init)

    def _match_bias(self) -> None:
        if not self.bias and isinstance(self.fc, nn.Linear):
            self.fc.register_parameter("bias", None)

    def forward_stem(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C * H * W]
        """The flattened images.

        Raises:
            ValueError: images of another size.
        """
        check_images(x, self.input_size)
        return self.flatten(x)

    def forward_checkpointed(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A hidden layer that is recomputed in backward."""
        return checkpoint(stage, x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; the last BN stays. ValueError for a `global_pool`: an MLP has nothing to pool."""
        if global_pool:
            raise ValueError(f"an MLP has nothing to pool, got global_pool={global_pool!r}; leave it out")
        set_classifier(self, num_classes)
        self._match_bias()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups: the first layer, then each hidden layer."""
        return dict(stem=r"^layers\.0\.", blocks=r"^layers\.(\d+)")


def check_images(x: Tensor, input_size: tuple[int, int, int]) -> None:
    """Reject images that have not as many values as the first layer takes."""
    if math.prod(x.shape[1:]) != math.prod(input_size):
        size = " x ".join(map(str, input_size))
        raise ValueError(
            f"this MLP takes {math.prod(input_size)} values an image ({size}), got inputs of shape {list(x.shape)}; "
            "create_model(..., input_size=(channels, height, width)) builds it for other images"
        )


def check_mlp(layers: int, width: int, global_pool: str) -> None:
    """Reject sizes and options no MLP can have; each message says what is allowed."""
    if layers < 2:
        raise ValueError(f"layers counts linear layers, the classifier included, and must be at least 2, got {layers}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if global_pool:
        raise ValueError(f"an MLP has nothing to pool, got global_pool={global_pool!r}; leave it out")


register_table(__name__, "mlp", MLP, first_conv=None)
