"""`convert`: weights of other projects, or of timm with a last BN put in, as checkpoints of condzoo's format.

Pickles are read by torch's weights-only unpickler, which runs no code.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm

import condzoo
from condzoo.catalog import model_info, read_catalog
from condzoo.checkpoints.folder import CONVERSION
from condzoo.checkpoints.foreign import channels_of, has_projections, read_foreign, translate
from condzoo.checkpoints.timm_sources import calibration_images, images_of, timm_network
from condzoo.checkpoints.writing import (
    check_free,
    check_tag,
    root_of,
    serialize,
    timm_config,
    write_checkpoint,
    write_table,
)
from condzoo.models import create_model, insert_last_bn
from condzoo.models.last_bn_heads import find_head
from condzoo.models.last_bn_insertion import drops_by_call
from condzoo.models.registry import FAMILIES
from condzoo.models.timm_models import current_name
from condzoo.models.weight_files import in_float32, sha256
from condzoo.probe.files import expanded

OWN_ROOT = Path("converted")  # the repository's checkpoints/ holds what is released
# what timm's configs say of how images are prepared
PREPROCESSING = (
    "input_size",
    "mean",
    "std",
    "crop_pct",
    "crop_mode",
    "interpolation",
    "fixed_input_size",
    "test_input_size",
    "test_crop_pct",
)


@dataclass(frozen=True)
class Origin:
    """What conversion.json says of where the weights are from; see `condzoo.checkpoints.records.Conversion`."""

    name: str
    digest: str | None
    note: str
    license: str
    preprocessing_known: bool


@in_float32()
def convert(
    source: str | Path,
    model: str,
    *,
    tag: str = "converted",
    out: str | Path | None = None,
    license: str = "unknown",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Make a checkpoint of a state dict in a file: pickled or safetensors, with wrapper prefixes, of other projects.

    Taken by their own names: condzoo's, torchvision's and timm's keys, akamaster's CIFAR ResNets (another order of
    channels) and chenyaofo's (option-B shortcuts: the network gets `projection=True`). Plain weights go into a
    `_lastbn` network too: its last BN is then the identity. A first convolution says how many channels images have.

    Args:
        source: the file.
        model: which network of condzoo's it is.
        tag: of the new checkpoint. out: the folder that takes `model.tag/`; default: ./converted.
        license: of the weights, for config and model card.
        mean, std: of every channel of images in [0, 1], which the network's were standardized with. Without them the
            card says that they are not known, and config.json has those usual for the network.

    Returns:
        The folder.

    Raises:
        ValueError: a file that is no state dict, or not of this network (names the first key that differs); `mean` or
            `std` alone, or of other than one finite number a channel.
        FileNotFoundError, FileExistsError: no such file; a checkpoint of that name.
    """
    content, state, said = read_foreign(expanded(source))
    info = model_info(model)
    target = check_free(root_of(out, OWN_ROOT) / f"{info.name}.{check_tag(tag)}")
    classes = next((len(v) for k, v in state.items() if k in ("fc.weight", "linear.weight") and v.ndim), None)
    args: dict[str, Any] = {"projection": True} if has_projections(state) and info.family == "cifar_resnet" else {}
    channels = channels_of(state, FAMILIES[info.family].first_conv) if info.family in FAMILIES else None
    network: Any = create_model(model, num_classes=classes, in_chans=channels, **args).eval()
    state, note = translate(state, network, str(source))
    network.load_state_dict(state)
    fields = images_of(network.pretrained_cfg, channels)
    given = standardization(mean, std, channels or network.pretrained_cfg["input_size"][0])
    origin = Origin(said, sha256(content), note, license, preprocessing_known=bool(given))
    return write(target, network, tag, origin, fields | given, args=args)


@in_float32()
def convert_last_bn(
    source: str,
    *,
    weights: str | Path | None = None,
    calibrate: str | Path | None = None,
    images: int = 1024,
    tag: str = "converted",
    out: str | Path | None = None,
    license: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Make the last-BN twin of a classifier of timm's, with the same function in eval mode (`insert_last_bn`).

    Args:
        source: "timm/resnet50.a1_in1k" (with timm's own weights), or with `weights` the architecture alone; an older
            name of timm's stands for what it is today.
        weights: a state dict of it in a file, instead of timm's own; also under the names of older versions of timm
            and of the networks' authors, where timm itself takes them. Its first convolution says how many channels
            images have; those of calibration are made grey for one.
        calibrate: folder of images, one folder a class as torchvision's ImageFolder; with it the last linear layer's
            input is standardized on them. Without, the last BN is the identity.
        images: how many of them, spread evenly over the folder.
        tag, out, mean, std: as for `convert`; without them timm's preprocessing, which is known where the weights are
            timm's or `source` has a tag.
        license: of the weights; None: timm's, for its own.

    Returns:
        The folder. ResNets 18 to 152 become condzoo's own `_lastbn` networks; others are timm's with a BN put in.

    Raises:
        ValueError: not a model of timm's, no single linear head, or a folder without images.
        FileNotFoundError, FileExistsError: as for `convert`.
    """
    name = current_name(source.removeprefix("timm/"))
    arch = name.split(".", 1)[0]
    if not timm.is_model(name) or arch in read_catalog()[0]:
        raise ValueError(not_timms(source, arch))
    ours = arch + "_lastbn" in read_catalog()[0]
    target = check_free(root_of(out, OWN_ROOT) / f"{arch}{'_lastbn' * ours}.{check_tag(tag)}")
    network, said, digest, channels = timm_network(name, weights)
    cfg = network.pretrained_cfg
    fields = {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None} | images_of(cfg, channels)
    if channels is not None and "test_input_size" in fields:
        fields["test_input_size"] = (channels, *fields["test_input_size"][1:])
    given = standardization(mean, std, fields["input_size"][0])
    described = {**cfg, **fields, **given}  # the images of calibration are prepared alike
    batches = [] if calibrate is None else calibration_images(described, expanded(calibrate), images)
    args = {"drop_rate": 0.0} if drops_by_call(network, find_head(network)) else {}
    if args:
        network.drop_rate = 0.0
    insert_last_bn(network.eval(), batches or None)
    note = "A BatchNorm1d stands before its last linear layer; the function is the same in eval mode. " + (
        f"Its statistics are of {sum(map(len, batches))} images; the last layer absorbs them."
        if batches
        else "It is the identity."
    )
    note += " Dropout, which timm puts before that layer by a function call, is off." if args else ""
    license = license or str((cfg.get("license") if weights is None else None) or "unknown")
    known = weights is None or ("." in name and channels is None) or bool(given)
    if ours:
        network = as_ours(network, arch + "_lastbn", channels)
    origin = Origin(said, digest, note, license, known)
    return write(target, network, tag, origin, fields | given, inserted=not ours, args=args)


def not_timms(source: str, arch: str) -> str:
    """The error text for a source that timm does not have: condzoo's own way to a last BN, or the closest name."""
    said = f"{source!r} is not a model of timm's; give one as timm/resnet50 (timm.list_models() has them)"
    known = read_catalog()[0]
    if arch in known:
        twin = arch if arch.endswith("_lastbn") else f"{arch}_lastbn"
        return said + (f"; for condzoo's own: condzoo convert FILE --model {twin}" if twin in known else "")
    close = difflib.get_close_matches(arch, sorted(set(timm.list_models()) - set(known)), n=1)
    return said + (f"; did you mean 'timm/{close[0]}'?" if close else "")


def as_ours(theirs: Any, name: str, channels: int | None) -> Any:
    """condzoo's network of the same keys, with the weights of timm's; `channels`: of images, None for the usual."""
    ours: Any = create_model(name, num_classes=theirs.num_classes, in_chans=channels).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def standardization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> dict[str, tuple[float, ...]]:
    """The fields of a config that `mean` and `std` give; none where neither is given.

    Raises:
        ValueError: one without the other, or other than one finite number a channel, a std above 0.
    """
    if mean is None and std is None:
        return {}
    given = [tuple(map(float, values)) for values in (mean, std) if values is not None]
    whole = len(given) == 2 and all(len(values) == channels and all(map(math.isfinite, values)) for values in given)
    if not whole or min(given[1]) <= 0:
        raise ValueError(
            f"mean and std are {channels} finite numbers each, one a channel of images in [0, 1], std above 0; "
            f"got mean {mean} and std {std}"
        )
    return {"mean": given[0], "std": given[1]}


def write(
    target: Path,
    network: Any,
    tag: str,
    origin: Origin,
    fields: Mapping[str, Any],
    inserted: bool = False,
    args: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint's folder and the table of its root.

    Args:
        fields: of timm's config, in place of the network's own.
        args: build the network beside its name.
    """
    content = serialize(network)
    record = {
        "model": network.pretrained_cfg["architecture"],
        "tag": tag,
        "sha256": sha256(content),
        "parameters": sum(p.numel() for p in network.parameters()),
        "origin": origin.name,
        "origin_sha256": origin.digest,
        "note": origin.note,
        "license": origin.license,
        "preprocessing_known": origin.preprocessing_known,
        "condzoo": condzoo.__version__,
    }
    config = timm_config(network, tag, {**fields, "license": origin.license})
    config |= {"insert_last_bn": True} if inserted else {}
    config["model_args"] = {**config["model_args"], **args}
    write_checkpoint(target, network, content, config, {CONVERSION: record})
    write_table(target.parent)
    return target
