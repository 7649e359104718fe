"""What `precision` and `channels_last` mean on a device, and what `auto` picks there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from condzoo.probe.arithmetic import full_float32
from condzoo.training.schema import Recipe

DEVICES = ("cpu", "cuda")  # that compute in float64, too: torch has others, on which a tensor can be made
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of a run: `precision` as resolved (fp32, bf16 or fp16), and the memory format."""

    precision: str
    channels_last: bool
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes; parameters and the loss stay in float32."""
        dtype = DTYPES[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Inside, torch has its own defaults, which recipes count on, whatever a notebook has set.

    They are float32 and the CPU for new tensors, no autocast, and gradients are kept. One is not: float32 is multiplied
    and convolved in float32 on GPUs, too, where torch convolves in TF32. Also a decorator.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as held:
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # a context of a device slows every operation
            held.enter_context(torch.device("cpu"))
        if within_autocast():  # until that ends torch keeps the weights that it has cast, whatever changes them
            held.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
        for kind in DEVICES:
            held.enter_context(full_float32(kind))
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        held.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def within_autocast() -> bool:
    """Whether the caller is inside a torch.autocast, of any device, enabled or not."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() > 0


def resolve_numerics(recipe: Recipe, model: nn.Module, device: torch.device) -> Numerics:
    """What the recipe's `auto` are for this network on this device.

    Raises:
        ValueError: fp16 on a CPU.
    """
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    channels_last = convolutional if recipe.channels_last == "auto" else recipe.channels_last
    check_precision(recipe, device.type)
    return Numerics(resolve_precision(recipe, convolutional, has_bf16_units(device)), channels_last, device)


def check_precision(recipe: Recipe, kind: str) -> None:
    """See that devices of this kind (cpu, cuda) compute as the recipe asks.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if recipe.precision == "fp16" and kind == "cpu":
        raise ValueError("precision: fp16 needs a GPU; on a CPU use bf16, fp32 or auto")


def resolve_precision(recipe: Recipe, convolutional: bool, bf16_units: bool) -> str:
    """Settle `auto`: bf16 for convolutions where the device has units for it, fp32 elsewhere.

    bf16 convolutions on a CPU are fast in channels_last only (without it slower than fp32), so
    they are picked only where channels_last is not switched off.
    """
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if convolutional and bf16_units and recipe.channels_last is not False else "fp32"


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: AMX or AVX512-BF16, or a GPU that says so."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # the current one is asked
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch has no public name for these yet; a release that drops them reads as "no".
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None and "auto" are a GPU where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).partition(":")[0] == "mps":
        raise ValueError(f"device {str(device)!r}: sums are in float64, which MPS does not have; use --device cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ImportError) as error:  # hpu is in a package of its own
        first = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {first}; try --device cpu") from error
    if resolved.type not in DEVICES:
        allowed = ", ".join(DEVICES)
        raise ValueError(f"device {str(device)!r} cannot be used here: it must be of {allowed}; try --device cpu")
    return resolved
