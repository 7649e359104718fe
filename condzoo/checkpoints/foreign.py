"""State dicts of other projects: read without running code, unwrapped, and brought to condzoo's keys and channels.

Shapes: C channels of a stage, K classes.
"""

import argparse
import io
import itertools
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.models.weight_files import PICKLE_STARTS, check_state, describe, parse_weights, read_plain_file

# where training scripts put the weights among other things, the average first
NESTED = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "checkpoint",
)
DEEPEST = 3  # a pickle may hold itself
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.", "ema.", "ema_model.")


class Unread:
    """What stands for numpy's numbers and arrays, a best accuracy beside the weights, say: nothing of them is read."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# what timm's training script, and others, keep beside the weights; it only holds values
PLAIN: list[Any] = [argparse.Namespace]
# by names, in place of numpy's own, whose reader trusts what a pickle says of memory
PLAIN += [(Unread, name) for name in ("numpy.dtype", "numpy.ndarray")]
PLAIN += [
    (Unread, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")
]
# option-B shortcuts' weights: chenyaofo's and torchvision's name, akamaster's and condzoo's
PROJECTION = re.compile(r"^(layer\d+\.\d+)\.(?:downsample|shortcut)\.")

ZIP_START = PICKLE_STARTS[0]  # by which torch.load tells an archive
COUNTER = "num_batches_tracked"  # BatchNorm's, which eval mode does without

# how torch's weights-only unpickler names what a pickle asks for
GLOBAL = re.compile(r"(?:GLOBAL|global|function|class)\s+`?([\w.]+\.[\w.]+)`?")


def read_foreign(path: Path) -> tuple[bytes, dict[str, Tensor], str]:
    """A file's content, the state dict in it, out of what it is nested in and without wrapper prefixes, and its name.

    The name says which of the file's entries was taken: `last.pth['model_ema']`. A link is followed: the file is the
    caller's own choice, and the Hub's cache is made of links.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state dict, or a pickle that needs code to be run.
    """
    content = read_plain_file(Path(os.path.realpath(path)))
    named_so = path.suffix == ".safetensors" and not content.startswith(PICKLE_STARTS)
    if named_so or begins_as_safetensors(content):
        state, entry = parse_weights(content, str(path), finite=False), ""
    else:
        state, entry = read_pickle(content, path)
    # a counter is no floating-point number but where all of a file was cast; in half precision it may be infinite
    state = {k: v for k, v in state.items() if not (k.endswith(COUNTER) and v.is_floating_point())}
    for key, value in state.items():
        check_values(value, f"{path}: {key!r}", len(content))
    return content, strip_prefixes(state), path.name + entry


def check_values(value: Tensor, said: str, most: int) -> None:
    """ValueError for a tensor that is not there whole, is not finite, or has more bytes than `most`, its file's."""
    if value.is_nested or value.is_meta or value.layout != torch.strided:
        kind = "nested" if value.is_nested else f"{value.layout} on {value.device}"
        raise ValueError(f"{said} is no tensor with all its values: {kind}")
    if value.numel() * value.element_size() > most:  # by strides of 0
        raise ValueError(f"{said} is {describe(value)}, which the {most:,} bytes of its file do not hold")
    try:
        finite = not value.is_floating_point() or torch.isfinite(value.double()).all()  # not every type of 8 bits knows
    except NotImplementedError as error:  # torch's, where it has no conversion from a type: numbers of 4 bits
        raise ValueError(f"{said} is {describe(value)}, a type that torch cannot convert here") from error
    if not finite:
        raise ValueError(f"{said} has values that are not finite; these weights cannot be used")


def check_stored(content: bytes, path: Path) -> None:
    """ValueError for a zip archive that unpacks to more than its size: torch.save's never does."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(content)).infolist() if content.startswith(ZIP_START) else []
    except Exception:  # no archive at all, which torch's own reader says
        return
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > len(content):
        raise ValueError(f"{path} is a compressed archive, and torch.save's are not; save the state dict by it again")


def read_pickle(content: bytes, path: Path) -> tuple[dict[str, Tensor], str]:
    """(the state dict in a file of torch.save's, which of its entries that is); ValueError as `read_foreign`."""
    check_stored(content, path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")  # pickle protocols that torch does not write itself
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle ends the unpickler in many ways, IndexError and struct.error too
        raise ValueError(
            f"{path} is no state dict that can be read without running code: {refusal(error)}; "
            "torch.save(model.state_dict(), FILE), where it was made, writes one"
        ) from error
    found = find_state(loaded)
    if found is None:
        raise ValueError(
            f"{path} holds no state dict: it is a {type(loaded).__name__} of other things than tensors by name"
        )
    return found


def begins_as_safetensors(content: bytes) -> bool:
    """Whether a file begins with the length of a header of less than 4 GB, and that header; no pickle does."""
    return content[4:9] == b"\0\0\0\0{"


def find_state(loaded: Any, deepest: int = DEEPEST) -> tuple[dict[str, Tensor], str] | None:
    """The state dict that was loaded, or the first one in it under one of the names of `NESTED`; None without any.

    With it comes where it stands, `['ema']['module']`.
    """
    if not isinstance(loaded, dict) or not loaded:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        return loaded, ""
    inner = ((name, find_state(loaded.get(name), deepest - 1)) for name in NESTED if deepest)
    return next(((found[0], f"[{name!r}]{found[1]}") for name, found in inner if found is not None), None)


def refusal(error: Exception) -> str:
    """Why torch's weights-only unpickler stopped: what would have run, else the kind of error; never its own advice."""
    wanted = GLOBAL.search(str(error))
    return (
        f"it asks for {wanted[1]}"
        if wanted
        else f"torch's weights-only reader does not take it ({type(error).__name__})"
    )


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what every key starts with because of a wrapper (DataParallel, torch.compile, Lightning).

    torch's AveragedModel has, beside the network under `module.`, the count of what it averaged.
    """
    stripped = {key: value for key, value in state.items() if key != "n_averaged"}
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in stripped):
                stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def channels_of(state: Mapping[str, Tensor], first_conv: str | None) -> int | None:
    """Channels of the images that a first convolution of this name takes; None where the weights have no such one."""
    weight = state.get(f"{first_conv}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else None


def has_projections(state: Mapping[str, Tensor]) -> bool:
    """Whether the shortcuts that change size have weights of their own (option B)."""
    return any(PROJECTION.match(key) for key in state)


def translate(state: Mapping[str, Tensor], network: nn.Module, source: str) -> tuple[dict[str, Tensor], str]:
    """(a state dict that loads into the network, what was done to it, in words).

    A last BN that the weights do not have is left to the network; so are BatchNorm's batch counters, which old files
    lack.

    Raises:
        ValueError: weights of another network; names the first key that differs.
    """
    cifar = type(network).__name__ == "CifarResNet"
    state, note, reordered = dict(state), "The network's own keys, and its order of channels.", False
    if cifar and has_projections(state):
        state, note = from_projections(state), "Option-B shortcuts, renamed to condzoo's keys."
    elif cifar and "linear.weight" in state:
        if network.get_submodule("layer1.0").shortcut is None:
            raise ValueError(f"{source}: akamaster's networks have shortcuts, this one has none; take cifar_resnet")
        state = with_fc(state)
        note, reordered = "Channels of the second and third stage put in condzoo's order.", True
    expected = network.state_dict()
    note += cast_values_(state, expected, source)
    if not any(key.startswith("last_bn.") and not key.endswith("_tracked") for key in state):
        expected = {key: value for key, value in expected.items() if not key.startswith("last_bn.")}
        state = {key: value for key, value in state.items() if not key.startswith("last_bn.")}
        note += " The last BN is the identity." if hasattr(network, "last_bn") else ""
    check_state(state, expected, source)
    return (from_akamaster(state) if reordered else state), note


def cast_values_(state: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> str:
    """Give the weights the network's dtypes, and the batch counters that are not there, in place; say from which.

    Raises:
        ValueError: values that the network's dtype does not have.
    """
    cast = set()
    for key, value in expected.items():
        if key.endswith(COUNTER):
            state.setdefault(key, torch.zeros_like(value))
        elif key in state and state[key].is_floating_point() and state[key].dtype != value.dtype:
            cast.add(f"{state[key].dtype} to {value.dtype}")
            state[key] = state[key].to(value.dtype)
            if not torch.isfinite(state[key]).all():
                raise ValueError(f"{source}: {key!r} has values beyond those of {value.dtype}")
    return f" Values cast from {', '.join(sorted(cast))}." if cast else ""


def from_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CIFAR ResNet with option-B shortcuts under condzoo's keys; its channels have their order already."""
    return with_fc({PROJECTION.sub(r"\1.shortcut.", key): value for key, value in state.items()})


def with_fc(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The classifier under condzoo's name, where it has akamaster's."""
    return {re.sub(r"^linear\.", "fc.", key): value for key, value in state.items()}


def from_akamaster(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of akamaster/pytorch_resnet_cifar10: the classifier's name, and the order of channels.

    Its option-A shortcut puts half of the new, empty channels before the old ones and half after them; condzoo's puts
    all after. Renumbering the channels of each stage's stream makes the two the same function; channels inside a
    block (between its two convolutions) are free and stay.
    """
    widths = [state[f"layer{stage}.0.conv2.weight"].shape[0] for stage in (1, 2, 3)]
    order = torch.arange(widths[0])  # their channel at each of condzoo's places
    orders = [order]
    for c_in, c in itertools.pairwise(widths):
        before = (c - c_in) // 2
        order = torch.cat([order + before, torch.arange(before), torch.arange(c_in + before, c)])
        orders.append(order)
    renumbered = {}
    for key, value in with_fc(state).items():
        stage, _, rest = key.removeprefix("layer").partition(".")
        if key == "fc.weight":
            renumbered[key] = value[:, orders[2]]
        elif key.startswith("last_bn.") and value.ndim:
            renumbered[key] = value[orders[2]]
        elif not key.startswith("layer"):
            renumbered[key] = value
        else:
            block, name = rest.split(".", 1)
            into, out = orders[int(stage) - 1 - (block == "0" and stage != "1")], orders[int(stage) - 1]
            if name == "conv1.weight":
                value = value[:, into]
            elif (name == "conv2.weight" or name.startswith("bn2.")) and value.ndim:
                value = value[out]
            renumbered[key] = value
    return renumbered
