"""The zoo in timm's registry, and `create_model`.

Each family is one literal table, tables/<family>.toml, and one class. A row says what to build and how large it
is; `register_table` makes a timm entry point of every row. Sizes that have no row (`mlp12x64_bn`,
`cifar_resnet62`) are built by `create_model` from the row of a sibling, which differs only in its numbers.
"""

import contextlib
import difflib
import functools
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, model_entrypoint, register_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from condzoo.models.head import check_input_size, check_sizes
from condzoo.models.pretrained import chosen_release, fit_weights, released_config, tagged_configs
from condzoo.models.timm_models import create_timm_model

TABLES = Path(__file__).parent / "tables"
NUMBERS = re.compile(r"\d+")  # what siblings differ in
NORMS = {"bn": ("BatchNorm",), "ln": ("LayerNorm", "RMSNorm", "RmsNorm"), "gn": ("GroupNorm",)}  # in a class's name
# layers, and units of one: where a digit too many was typed, no network that takes minutes, or that no memory holds
DEEPEST, WIDEST = 10_000, 1_000_000


@dataclass(frozen=True)
class Family:
    """One table: what its models share, and the class that builds them from a row's `args`."""

    name: str
    build: Callable[..., nn.Module]
    shared: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    first_conv: str | None


FAMILIES: dict[str, Family] = {}
FACTORY = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
)
"""What timm.create_model takes for itself, and gives no network."""


def register_table(module: str, family: str, build: Callable[..., nn.Module], first_conv: str | None) -> None:
    """Register the rows of tables/<family>.toml with timm, as entry points of `module`.

    A name that timm has of its own is left to timm: it is never overwritten.

    Args:
        module: the importing module's `__name__`; timm files models under its last component.
        family: the table's name.
        build: called with a row's `args` and the caller's keyword arguments.
        first_conv: name of the layer that sees the image, for timm's adaption to other `in_chans`.
    """
    shared = tomllib.loads((TABLES / f"{family}.toml").read_text())
    every = shared.pop("models")
    ours = {name for name in every if is_model(name) and model_entrypoint(name).__module__ == module}  # a reload
    rows = {name: row for name, row in every.items() if name in ours or not is_model(name)}
    FAMILIES[family] = table = Family(family, build, shared, rows, first_conv)
    mod = sys.modules[module]
    tagged = [tagged_configs(name, pretrained_config(table, name)) for name in rows]
    configs = generate_default_cfgs({key: config for configs in tagged for key, config in configs.items()})
    mod.__dict__.setdefault("default_cfgs", {}).update(configs)
    for name, row in rows.items():
        entry_point = functools.partial(build_network, table, name, row["args"])
        entry_point.__name__ = entry_point.__qualname__ = name  # type: ignore[attr-defined]
        entry_point.__module__ = module
        entry_point.__doc__ = f"{name}: {shared['title']}."
        setattr(mod, name, entry_point)
        if name not in ours:
            register_model(entry_point)


def pretrained_config(family: Family, name: str) -> dict[str, Any]:
    """timm's description of a model's input, head and normalization."""
    shared = family.shared
    row = family.rows.get(name, {})
    return {
        "input_size": tuple(row.get("input_size", shared["input_size"])),
        "num_classes": shared["num_classes"],
        "mean": tuple(shared["mean"]),
        "std": tuple(shared["std"]),
        "crop_pct": shared.get("crop_pct", 1.0),
        "interpolation": shared.get("interpolation", "bilinear"),
        "first_conv": family.first_conv,
        "classifier": "fc",
        "pool_size": tuple(shared["pool_size"]) if "pool_size" in shared else None,
        "license": "apache-2.0",
    }


def build_network(
    family: Family, name: str, args: dict[str, Any], pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """timm's entry point of one model: what timm.create_model calls.

    Raises:
        ValueError: as `create_model`.
    """
    built = kwargs.get("pretrained_model_args") or {}  # timm hands back what the network that was saved was built with
    if pretrained and kwargs.get("init") is not None and kwargs["init"] == built.get("init"):
        del kwargs["init"]
    check_new_weights(kwargs.get("init"), pretrained)
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    if "input_size" in kwargs:  # timm would fill in the table's in_chans
        check_input_size(kwargs["input_size"])
        kwargs.setdefault("in_chans", kwargs["input_size"][0])
    release = chosen_release(name, pretrained, kwargs)
    if release is not None:  # what the index says, checked here, instead of a file that timm would read
        usual = pretrained_config(family, name)
        kwargs["pretrained_cfg"] = released_config(release, usual, family.build, args, kwargs)
    elif not kwargs.get("pretrained_cfg"):  # new weights: of the table's sizes, whatever data a release was trained on
        kwargs["pretrained_cfg"] = pretrained_config(family, name)
    with torch.device(device) if device is not None else contextlib.nullcontext():
        model = build_model_with_cfg(
            family.build,
            name,
            pretrained,
            feature_cfg=feature_config(family, args),
            pretrained_filter_fn=fit_weights,
            **{**args, **kwargs},
        )
    for part in model.modules():  # with features_only, the network inside has a config of its own
        getattr(part, "pretrained_cfg", {}).pop("state_dict", None)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if "input_size" in kwargs:  # an MLP takes these images alone: timm's transforms are made by what is said here
        config["input_size"] = (kwargs["in_chans"], *kwargs["input_size"][1:])
    return model if dtype is None else model.to(dtype)


def feature_config(family: Family, args: dict[str, Any]) -> dict[str, Any]:
    """timm's `features_only` settings: one level a stage, or a hidden layer of an MLP."""
    if "feature_levels" in family.shared:
        return dict(out_indices=tuple(range(family.shared["feature_levels"])))
    return dict(out_indices=tuple(range(args["layers"] - 1)), flatten_sequential=True)


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    init: str | None = None,
    last_bn_init: str = "ones",
    **model_kwargs: Any,
) -> nn.Module:
    """Build a network by its name: any model of the zoo, any other size of its MLPs and CIFAR nets, any of timm's.

    The same network as timm.create_model builds, equal in values under one seed.

    Args:
        name: e.g. "resnet50_lastbn", "cifar_resnet20_lastbn", "mlp12x64_bn", "cifar_resnet20.authors" (a tag names
            released weights).
        pretrained: load released weights.
        num_classes: outputs; 0 returns the classifier's input; None keeps the data set's.
        init: a scheme of `init_weights` in place of the family's own; for new weights only.
        last_bn_init: gamma of the last BN, "ones" or, as the authors' code has it, "uniform".
        **model_kwargs: as timm's: in_chans, drop_rate, global_pool, features_only, out_indices ...

    Raises:
        ValueError: an unknown name (with the closest ones), depth, `init`, `last_bn_init` or size; `init` beside
            trained weights.
    """
    check_new_weights(init, pretrained, model_kwargs.get("checkpoint_path"))
    in_chans = model_kwargs.get("in_chans")
    check_sizes(10 if num_classes is None else num_classes, 1 if in_chans is None else in_chans)
    if num_classes is not None:
        model_kwargs["num_classes"] = int(num_classes)  # numpy's integers are no ints
    if in_chans is not None:
        model_kwargs["in_chans"] = int(in_chans)
    arch = name.split(".", 1)[0]
    ours = any(arch in family.rows for family in FAMILIES.values())
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))  # timm's way to name a folder of weights
    if (is_model(arch) or elsewhere) and not ours:
        return create_timm_model(name, pretrained, init, last_bn_init, model_kwargs)
    if init is not None:
        model_kwargs["init"] = init
    if last_bn_init != "ones":
        model_kwargs["last_bn_init"] = last_bn_init
    if ours:
        return timm.create_model(name, pretrained=pretrained, **model_kwargs)
    family, args = sibling(name)
    if pretrained or name != arch:  # with a tag
        raise ValueError(f"no weights are released for {name!r}: it is not one of the registered models")
    given = {key: value for key, value in model_kwargs.items() if value is not None}  # as timm does it
    factory = {key: given.pop(key) for key in FACTORY if key in given}
    config = factory.get("pretrained_cfg") or pretrained_config(family, name)
    network = build_network(family, name, args, pretrained_cfg=config, **given)
    if path := factory.get("checkpoint_path"):
        timm.models.load_checkpoint(network, path)
    return network


def check_new_weights(init: str | None, pretrained: bool, checkpoint_path: Any = None) -> None:
    """ValueError where an initializer is asked for beside trained weights, of which one would undo the other."""
    if init is not None and (pretrained or checkpoint_path):
        loads = "pretrained=True" if pretrained else "checkpoint_path"
        raise ValueError(
            f"init={init!r} is for new weights, and {loads} loads trained ones; leave one out "
            "(condzoo.init_weights changes the weights of a network that is there)"
        )


def sibling(name: str) -> tuple[Family, dict[str, Any]]:
    """The family and arguments of a name without a row, from the row that differs from it only in its numbers.

    A tag is left out of account.

    Raises:
        ValueError: no such row (the message names the closest models), or beyond `DEEPEST` or `WIDEST`.
    """
    arch = name.split(".", 1)[0]
    shape = NUMBERS.sub("#", arch)
    numbers = [int(n[:10]) for n in NUMBERS.findall(arch)]  # whatever follows, ten digits are beyond the bounds
    for family in FAMILIES.values():
        size = family.shared["size"]  # the arguments that the numbers of a name stand for, in their order
        for row_name, row in family.rows.items():
            if NUMBERS.sub("#", row_name) == shape and size and len(size) == len(numbers):
                if numbers[0] > DEEPEST or numbers[-1] > WIDEST:
                    said = arch if len(arch) <= 60 else f"{arch[:57]}..."
                    raise ValueError(f"{said!r}: at most {DEEPEST:,} layers, of {WIDEST:,} units, are built by name")
                own = {k: v for k, v in row["args"].items() if k != "input_size"}  # a sibling has the family's
                return family, {**own, **dict(zip(size, numbers, strict=True))}
    raise ValueError(unknown_model(name))


def unknown_model(name: str) -> str:
    """The error text for a name nobody has, with the closest ones."""
    score = {known: difflib.SequenceMatcher(None, name.lower(), known).ratio() for known in timm.list_models()}
    best = max(score.values())
    close = sorted((known for known in score if score[known] > best - 0.03), key=score.__getitem__, reverse=True)[:3]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if best > 0.6 else "condzoo.list_models() lists them all"
    return f"unknown model {name!r}; {hint}"


def describe(name: str) -> dict[str, Any]:
    """Measure a model that has no row: build it on the meta device, count parameters and multiply-adds.

    Returns:
        The fields of a `ModelInfo` but its name. For timm's own models `depth` counts convolutions and linear
        layers.

    Raises:
        ValueError: an unknown name.
    """
    with torch.device("meta"):
        model: Any = create_model(name).eval()
    config = model.pretrained_cfg
    input_size = tuple(getattr(model, "input_size", None) or config["input_size"])
    model.requires_grad_(False)  # the counter's hooks find no gradient function of some views (CaiT's, PiT's tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    weighted = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    family, args = (None, {}) if is_model(name) else sibling(name)
    return dict(
        family=family.name if family else "timm",
        dataset=family.shared["dataset"] if family else "imagenet",
        depth=args.get("depth") or args.get("layers") or weighted,
        norm=norm_of(model),
        last_bn=hasattr(model, "last_bn"),
        input_size=input_size,
        num_classes=config["num_classes"],
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        source=family.shared["source"] if family else "timm",
    )


def norm_of(model: nn.Module) -> str:
    """What most of the body's normalization layers are, a name of `NORMS`, or "none"; the last BN is not the body's.

    By the names of their classes and those these derive from: timm has frozen BatchNorms and RMS norms that derive
    from none of torch's.
    """
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        classes = " ".join(c.__name__ for c in type(module).__mro__)
        found.update(norm for norm, parts in NORMS.items() if name != "last_bn" and any(p in classes for p in parts))
    return max(found, key=found.__getitem__, default="none")
