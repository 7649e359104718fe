"""A network of the zoo under examination: built or copied, in float64 and train mode, with images that suit its depth.

Float64 shows the network and not round-off, and the deepest networks without BatchNorm, whose signals leave
float32's range, too.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm import is_model
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from condzoo.catalog import ModelInfo, model_info, read_catalog
from condzoo.models import create_model, insert_last_bn
from condzoo.models.last_bn import check_module
from condzoo.models.registry import FAMILIES, sibling
from condzoo.probe.arguments import whole_seed
from condzoo.probe.copying import copied
from condzoo.probe.wrappers import unwrapped

OTHER_NORMS = ("block_args", "norm_layer")  # timm's arguments that may put layers which no BN follows into a ResNet
USUAL = {"final_norm": True, "shortcut": True}  # what a row leaves to its class


@dataclass(frozen=True)
class Subject:
    """A network under validation, in float64 and train mode, with its images and labels.

    `changed`: arguments it was built with that the registered network, which the records are of, has not. `info` has
    its own number of classes and input size then, and the parameters and multiply-adds of a network built anew.
    """

    info: ModelInfo
    model: Any
    x: Tensor
    y: Tensor
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def maps(self) -> bool:
        """Whether its output is unpooled maps, which pass a last BN by."""
        return self.changed.get("global_pool") == ""


def prepare(name_or_model: str | nn.Module, seed: int) -> Subject:
    """The network as a float64 copy in train mode, and a batch small enough for its depth."""
    model: Any
    seed = whole_seed(seed)
    if isinstance(name_or_model, str):
        info = zoo_info(name_or_model)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, changed = create_model(info.name), {}
    else:
        check_module(name_or_model)
        # inside what torch.compile or DDP made; also of one that is frozen, on a GPU, or made in inference mode
        model = copied(unwrapped(name_or_model)).cpu().requires_grad_(True)
        arch = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
        wrapped = not hasattr(model, "get_classifier")  # features_only=True: stages without a head
        if not arch or wrapped or is_foreign(arch):
            raise ValueError(not_of_the_zoo(type(model).__name__))
        info = zoo_info(arch)
        changed = changed_arguments(model, info)
        info = with_arguments(info, changed)
        without_dropout(model)
    batch = 64 if info.family == "mlp" else 16 if info.depth <= 110 else 8
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *small_input(info), generator=generator, dtype=torch.float64)
    y = torch.randint(info.num_classes or model.num_features, (batch,), generator=generator)
    return Subject(info, model.double().train(), x, y, changed)


def zoo_info(name: str) -> ModelInfo:
    """What the zoo says of a network: registered, another size of one, or the plain twin of a last-BN network.

    Raises:
        ValueError: an unknown name, or another network of timm's.
    """
    if is_foreign(name):
        raise ValueError(not_of_the_zoo(name))
    return model_info(name)


def is_foreign(name: str) -> bool:
    """Whether this is a network of timm's that is no plain twin of the zoo's."""
    return is_model(name) and not any(name in table for table in read_catalog())


def not_of_the_zoo(said: str) -> str:
    """The error text for a network without promises."""
    return f"{said} is not a network of the zoo; validate takes a name or one of those"


def changed_arguments(model: Any, info: ModelInfo) -> dict[str, Any]:
    """The arguments of `create_model` that a network was built with, where they change what it computes."""
    found: dict[str, Any] = {}
    if model.num_classes != info.num_classes:
        found["num_classes"] = model.num_classes
    if info.family == "mlp":
        if tuple(model.input_size) != tuple(info.input_size):
            found["input_size"] = tuple(model.input_size)
        if not model.bias:
            found["bias"] = False
    else:
        first = next(layer for _, layer in weighted(model))
        if isinstance(first, nn.Conv2d) and first.in_channels != info.input_size[0]:
            found["in_chans"] = first.in_channels
        pool_type = getattr(model.global_pool, "pool_type", "avg")  # without one, another module stands there
        if pool_type != "avg":
            found["global_pool"] = pool_type
    built = USUAL | registered_arguments(info.name)
    found |= {key: value for key, value in variant(model).items() if built.get(key, value) != value}
    shortcuts = getattr(model, "has_shortcut", info.family == "cifar_resnet")
    if shortcuts and any(name.endswith(".shortcut.0") for name, _ in weighted(model)):
        found["projection"] = True
    if getattr(model, "last_bn_init", "ones") != "ones":
        found["last_bn_init"] = model.last_bn_init
    return found | getattr(model, "other_arguments", {})


def registered_arguments(name: str) -> dict[str, Any]:
    """What the zoo's class is called with for a network of this name; timm's own have no last BN."""
    rows = next((family.rows for family in FAMILIES.values() if name in family.rows), None)
    if rows is not None:
        return rows[name]["args"]  # type: ignore[no-any-return]
    return {"last_bn": False} if is_model(name) else sibling(name)[1]


def variant(model: Any) -> dict[str, bool]:
    """The keywords that make a family's variants, as a network has them; a last BN also where it was put in later.

    A network says itself whether it was built with BatchNorms and shortcuts, since one that lost them all is no
    variant; only the classes that always have some, and older pickles, do not say it.
    """
    body = (m for name, m in model.named_modules() if not name.startswith(("last_bn", "fc")))
    found = {
        "norm": model.has_norm if hasattr(model, "has_norm") else any(isinstance(m, _BatchNorm) for m in body),
        "last_bn": isinstance(getattr(model, "last_bn", None), nn.Module),
    }
    said = {"final_norm": "final_norm", "shortcut": "has_shortcut"}
    return found | {key: getattr(model, name) for key, name in said.items() if hasattr(model, name)}


def with_arguments(info: ModelInfo, changed: Mapping[str, Any]) -> ModelInfo:
    """The info of a network built with these arguments; its size and cost are those of one built here."""
    if not changed:
        return info
    size = changed.get("input_size", (changed.get("in_chans", info.input_size[0]), *info.input_size[1:]))
    with torch.random.fork_rng(devices=[]):
        built = build_with(info, changed)
    classes = changed.get("num_classes", info.num_classes)
    params, macs = size_of(built, size)
    norm = "bn" if changed.get("norm", info.norm == "bn") else "none"
    last_bn = changed.get("last_bn", info.last_bn)
    found = replace(info, input_size=size, num_classes=classes, params=params, macs=macs)
    # the CIFAR ResNets without shortcuts are the VGG-style ones, whichever name they were built by
    family = {True: "cifar_resnet", False: "cifar_vgg", None: info.family}[changed.get("shortcut")]
    return replace(found, norm=norm, last_bn=last_bn, family=family)


def build_with(info: ModelInfo, arguments: Mapping[str, Any]) -> nn.Module:
    """A network built with these arguments; timm's own take no last BN, which is put in while there is a head."""
    _, plain = read_catalog()
    if info.name not in plain:
        return create_model(info.name, **arguments)
    built: Any = create_model(info.name, in_chans=arguments.get("in_chans"))
    if arguments.get("last_bn"):
        insert_last_bn(built)
    built.reset_classifier(arguments.get("num_classes", info.num_classes), arguments.get("global_pool", "avg"))
    return built  # type: ignore[no-any-return]


def size_of(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters, and multiply-adds of convolutions and linear layers for one image."""
    on_meta = copy.deepcopy(model).to("meta").eval()
    dtype = next(model.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def without_dropout(model: Any) -> None:
    """The zoo's and timm's dropout drops nothing: the promises are of the network without it. No other is expected."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name == "head_drop":
            module.p = 0.0
        elif isinstance(module, DropPath | DropBlock2d):
            module.drop_prob = 0.0
    if hasattr(model, "drop_rate"):
        model.drop_rate = 0.0  # what timm's ResNets drop by


def small_input(info: ModelInfo) -> tuple[int, int, int]:
    """(C, H, W) of the images a network is examined on.

    Convolutional networks keep their promises at any size, and float64 convolutions are slow: the smallest images
    that leave a position after the last stride.
    """
    if info.family == "mlp":
        return info.input_size
    pixels = 8 if info.family in ("cifar_resnet", "cifar_preresnet", "cifar_vgg") else 32
    return (info.input_size[0], pixels, pixels)


def weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear layers by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))


@contextmanager
def recorded_inputs(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The inputs of `layers` in the order of the forward pass that runs inside."""
    inputs: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone())) for m in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
