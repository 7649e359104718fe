"""Networks of timm's to convert: with timm's own weights or those in a file, and images to take statistics from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.datasets import ImageFolder

from condzoo.checkpoints.foreign import COUNTER, channels_of, read_foreign, translate
from condzoo.data.image_files import read_image
from condzoo.models.timm_models import create_timm_model
from condzoo.models.weight_files import sha256
from condzoo.probe.files import expanded

CALIBRATION_BATCH = 64


def timm_network(name: str, weights: str | Path | None) -> tuple[Any, str, str | None, int | None]:
    """A network of timm's with timm's own weights, or those in a file.

    Returns:
        The network; where its weights are from; their file's SHA-256; the channels of images, None for the usual ones.

    Raises:
        ValueError: weights of another network; names the first key that differs.
    """
    network: Any = create_timm_model(name, pretrained=weights is None)
    if weights is None:
        return network, f"timm/{name}", None, None
    content, state, said = read_foreign(expanded(weights))
    said, digest = f"{said} for timm/{name}", sha256(content)
    if state and named(state) != named(network.state_dict()):  # of an empty one timm would ask the Hub
        renamed = read_by_timm(name, state, network, str(weights))
        if renamed is not None:
            return renamed, said, digest, None
    channels = channels_taken(state, network)
    if channels is not None:
        network = create_timm_model(name, model_kwargs={"in_chans": channels})
    classifier = state.get(f"{network.pretrained_cfg['classifier']}.weight")
    if classifier is not None and classifier.ndim and len(classifier) != network.num_classes:
        network.reset_classifier(len(classifier))
    state, _ = translate(state, network, str(weights))
    network.load_state_dict(state)
    return network, said, digest, channels


def named(state: Mapping[str, Tensor]) -> set[str]:
    """The names in a state dict, but for batch counters, which old files lack."""
    return {name for name in state if not name.endswith(COUNTER)}


def read_by_timm(name: str, state: Mapping[str, Tensor], usual: Any, source: str) -> Any | None:
    """timm's network with weights under other names, which timm's own reading of a file takes; None where it does not.

    Older versions of timm, and the authors of many of its networks, have other names than timm today.

    Args:
        usual: the network as timm builds it.

    Raises:
        ValueError: values that float32 does not have.
    """
    matrices = [value for value in state.values() if value.ndim == 2]
    classes = len(matrices[-1]) if matrices else usual.num_classes  # the classifier stands last

    def read(shift: float) -> Any:
        values = {key: value.float() + shift if value.is_floating_point() else value for key, value in state.items()}
        overlay = {"state_dict": values, "num_classes": classes, "label_offset": 0}
        arguments = {"num_classes": classes, "pretrained_cfg_overlay": overlay}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # what is not of the file is drawn alike
            return create_timm_model(name, pretrained=True, model_kwargs=arguments)

    try:
        network, shifted = read(0), read(1).state_dict()
    except Exception:  # each network's filter fails in its own way; the caller names the first key that differs
        return None
    for key, value in network.state_dict().items():
        # not of the file, which timm lets pass for some networks
        if value.is_floating_point() and torch.equal(value, shifted[key]):
            return None
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: {key!r}, as timm reads it, has values beyond those of {value.dtype}")
    network.pretrained_cfg = network.default_cfg = usual.pretrained_cfg  # without the weights
    return network


def channels_taken(state: Mapping[str, Tensor], network: Any) -> int | None:
    """The channels of images that weights take, by their first convolution; None where they are timm's usual ones."""
    cfg = network.pretrained_cfg
    found, own = (channels_of(each, cfg.get("first_conv")) for each in (state, network.state_dict()))
    if found is None or own is None or found == own:
        return None
    return found * int(cfg["input_size"][0]) // own or None  # some stems fold pixels into channels first


def images_of(cfg: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """The fields of a config for images of another number of channels, which are as the usual ones on average."""
    if channels in (None, cfg["input_size"][0]):
        return {}
    mean, std = ((sum(cfg[key]) / len(cfg[key]),) * channels for key in ("mean", "std"))
    return {"input_size": (channels, *cfg["input_size"][1:]), "mean": mean, "std": std}


def calibration_images(cfg: Mapping[str, Any], folder: Path, count: int) -> list[Tensor]:
    """Batches of images as timm would evaluate a network of this config on them, evenly spread over an ImageFolder.

    Where the network takes one channel, they are made grey.

    Raises:
        ValueError: no folder of images there, or fewer than two; one that cannot be read; other channels.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of images, one folder a class: it does not exist, or is a file")
    channels = cfg["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"images in files have 3 channels, or are made grey; these weights take {channels}")
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=dict(cfg)), is_training=False)
    try:
        data = ImageFolder(str(folder), transform, loader=read_image if channels == 3 else read_grey)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is no folder of images, one folder a class: {str(error).splitlines()[0]}"
        ) from error
    if len(data) < 2 or count < 2:
        raise ValueError(f"calibration needs at least 2 images, {folder} has {len(data)} and {count} were asked for")
    count = min(count, len(data))
    images = torch.stack([data[i * len(data) // count][0] for i in range(count)])
    return list(images.split(CALIBRATION_BATCH))


def read_grey(path: str) -> Any:
    """An image in one channel."""
    return read_image(path).convert("L")
