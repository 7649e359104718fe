"""Released weights as timm's models take them: configs by tag, and state dicts checked before timm sees them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import PretrainedCfg
from torch import Tensor, nn

from condzoo.models.released import Release, find_release, places, read_release, releases_of, weights_path
from condzoo.models.weight_files import as_saved, check_state

SOURCES = ("file", "url", "state_dict", "hf_hub_id")  # where a timm config may take weights from


def tagged_configs(arch: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A model's timm configs by key: arch.tag for each release, the default marked "*"; arch where there is none."""
    return {
        release.name + "*" * release.default: {**config, **release.input, "file": str(weights_path(release))}
        for release in releases_of(arch)
    } or {arch: config}


def chosen_release(arch: str, pretrained: bool, given: dict[str, Any]) -> Release | None:
    """The release that a call of timm's entry point asks for by its name; None where it asks for none.

    Args:
        arch: the model's name.
        pretrained: whether weights are wanted.
        given: the call's keyword arguments: timm's `pretrained_cfg` (a tag, or a config that says where weights
            are) and `pretrained_cfg_overlay`.

    Raises:
        ValueError: no such release.
    """
    config = given.get("pretrained_cfg")
    release = described_release(arch, given)
    if release is None and not brings_weights(given):
        release = find_release(arch, config) if pretrained or config else None
    return release if pretrained else None


def described_release(arch: str, given: Mapping[str, Any]) -> Release | None:
    """The release whose own config, as `tagged_configs` gave it to timm, a call hands back; None for any other.

    timm does so itself (its scripts take `model.pretrained_cfg`): it is checked, and fetched, as by its name.
    """
    config = {**config_fields(given), **(given.get("pretrained_cfg_overlay") or {})}
    if any(config.get(source) for source in (*SOURCES, "source") if source != "file"):
        return None
    tag, file = config.get("tag"), str(config.get("file"))
    known = releases_of(arch) if tag else []
    return next((r for r in known if r.tag == tag and file in map(str, places(r))), None)


def config_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a whole `pretrained_cfg` of a call; none where it has none, or a tag."""
    config = given.get("pretrained_cfg")
    if isinstance(config, PretrainedCfg):
        return config.to_dict()
    return dict(config) if isinstance(config, dict) else {}


def brings_weights(given: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call of timm.create_model say themselves where weights are.

    That is a whole `pretrained_cfg`, which takes the place of any by name, or an overlay with a source.
    """
    config, overlay = given.get("pretrained_cfg"), given.get("pretrained_cfg_overlay") or {}
    return (bool(config) and isinstance(config, dict | PretrainedCfg)) or any(overlay.get(source) for source in SOURCES)


def released_config(
    release: Release,
    config: dict[str, Any],
    build: Callable[..., nn.Module],
    args: dict[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """timm's config of a release with its weights in it: read, hash-checked, compared with the network as released.

    Args:
        config: of the model without weights.
        build, args: what builds it.
        given: the call's keyword arguments: the fields of a config in them stay.

    Raises:
        ValueError: not the released file, or not this network's.
        FileNotFoundError: the file is nowhere.
    """
    state = read_release(release)
    config = {**config, **release.input, "architecture": release.arch, "tag": release.tag}
    with as_saved():
        reference = build(**{**args, "num_classes": config["num_classes"], "in_chans": config["input_size"][0]})
    check_state(state, reference.state_dict(), release.name)
    return {**config, **config_fields(given), "file": str(weights_path(release)), "state_dict": state}


def fit_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a network of other channels or another pooling, beside what timm does itself.

    Raises:
        ValueError: as `fit_first_linear`.
    """
    return fit_last_bn(fit_first_linear(state, model), model)


def fit_last_bn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out a last BN of another size: where the pooling gives other features, it is as new as the classifier."""
    own, stored = getattr(model, "last_bn", None), state.get("last_bn.weight")
    if own is None or stored is None or len(stored) == own.num_features:
        return state
    return {key: value for key, value in state.items() if not key.startswith("last_bn.")}


def fit_first_linear(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit an MLP's first layer to another number of channels, as timm does it for first convolutions.

    One channel takes the sum of the weights; more repeat them, scaled so that equal channels give the same output.

    Raises:
        ValueError: images of another height or width, for which an MLP's weights mean nothing.
    """
    key = "layers.0.linear.weight"
    if key not in state or not hasattr(model, "input_size"):
        return state
    channels, height, width = model.input_size  # type: ignore[misc]
    values = state[key].shape[1]
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    described = tuple(config.get("input_size") or ())  # the weights' own, where it is theirs at all
    other = math.prod(described) == values and described[1:] != (height, width)
    if other or values % (height * width):
        of = " x ".join(map(str, described)) if other else f"{values} values"
        raise ValueError(
            f"these weights take images of {of}, got input_size={(channels, height, width)}; "
            "an MLP's weights fit one height and width"
        )
    weight = state[key].unflatten(1, (-1, height * width))  # [D, C, H * W]
    base = weight.shape[1]
    if channels == 1:
        weight = weight.sum(1, keepdim=True)
    elif channels != base:
        weight = weight.repeat(1, -(-channels // base), 1)[:, :channels] * (base / channels)
    return {**state, key: weight.flatten(1)}
