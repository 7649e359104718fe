"""State dicts of other projects: read without running code, unwrapped, and brought to condzoo's keys and channels.

Shapes: C channels of a stage, K classes.
"""

import io
import itertools
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from condzoo.models.weight_files import check_state, parse_weights, read_plain_file

# where training scripts put the weights among other things, the average first
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# option-B shortcuts' weights: chenyaofo's and torchvision's name, akamaster's and condzoo's
PROJECTION = re.compile(r"^(layer\d+\.\d+)\.(?:downsample|shortcut)\.")

# how torch's weights-only unpickler names what a pickle asks for
GLOBAL = re.compile(r"(?:GLOBAL|global|function|class)\s+`?([\w.]+\.[\w.]+)`?")


def read_foreign(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """A file's content, and the state dict in it, out of what it is nested in and without wrapper prefixes.

    A link is followed: the file is the caller's own choice, and the Hub's cache is made of links.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state dict, or a pickle that needs code to be run.
    """
    content = read_plain_file(Path(os.path.realpath(path)))
    if path.suffix == ".safetensors":
        return content, strip_prefixes(parse_weights(content, str(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle protocols that torch does not write itself
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle ends the unpickler in many ways, IndexError and struct.error too
        raise ValueError(f"{path} is no state dict that can be read without running code: {refusal(error)}") from error
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = isinstance(loaded, dict) and all(isinstance(v, Tensor) for v in loaded.values())
    if not tensors or not loaded or not all(isinstance(key, str) for key in loaded):
        raise ValueError(
            f"{path} holds no state dict: it is a {type(loaded).__name__} of other things than tensors by name"
        )
    for key, value in loaded.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key!r} has values that are not finite; these weights cannot be used")
    return content, strip_prefixes(loaded)


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
    state, note, reordered = dict(state), "Keys and values as they were.", False
    if cifar and has_projections(state):
        state, note = from_projections(state), "Option-B shortcuts, renamed to condzoo's keys."
    elif cifar and "linear.weight" in state:
        if network.get_submodule("layer1.0").shortcut is None:
            raise ValueError(f"{source}: akamaster's networks have shortcuts, this one has none; take cifar_resnet")
        state = with_fc(state)
        note, reordered = "Channels of the second and third stage put in condzoo's order.", True
    expected = network.state_dict()
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros_like(value))
        elif key in state and state[key].is_floating_point():
            state[key] = state[key].to(value.dtype)
    if not any(key.startswith("last_bn.") and not key.endswith("_tracked") for key in state):
        expected = {key: value for key, value in expected.items() if not key.startswith("last_bn.")}
        state = {key: value for key, value in state.items() if not key.startswith("last_bn.")}
        note += " The last BN is the identity." if hasattr(network, "last_bn") else ""
    check_state(state, expected, source)
    return (from_akamaster(state) if reordered else state), note


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
