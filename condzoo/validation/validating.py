"""Holding a network of the zoo against what its family promises (`condzoo validate`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from condzoo.checkpoints import load_checkpoint
from condzoo.checkpoints.loading import is_path
from condzoo.probe.wrappers import without_synchronization
from condzoo.validation.backward import check_backward, check_finite
from condzoo.validation.initial_conditioning import initial_records
from condzoo.validation.promises import (
    Check,
    check_conditioning,
    check_evaluation,
    check_function,
    check_initialization,
    check_last_bn,
    check_scaling,
    check_signals,
    check_size,
)
from condzoo.validation.subject import Subject, prepare, zoo_info


@dataclass(frozen=True)
class Validation:
    """What became of every promise of one model."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return all(check.ok for check in self.checks)

    def table(self) -> str:
        """One line a check."""
        rows = ((c, "skip" if c.skipped else "ok" if c.ok else "FAIL") for c in self.checks)
        return "\n".join(f"{self.model:32} {what:4}  {c.name:12} {c.detail}" for c, what in rows)


def validate(name_or_model: str | Path | nn.Module, *, seed: int = 0, trained: bool = False) -> Validation:
    """Build a model of the zoo and check what its family promises; a model given as such is left as it is.

    Checks: recorded parameters and multiply-adds; the function, by its logits with fixed weights; initial weights,
    biases, gammas and betas, and BatchNorms' settings; signal magnitudes over depth; finite forward and backward, and
    gradients as finite differences show them; scale invariance (BN) or homogeneity (Theorem 1); the last BN's bound;
    conditioning at initialization against the record shipped for the model; in eval mode finite logits, which by a
    batch's own statistics are train mode's.
    Of trained weights those that training does not end: size, function, finite, backward, eval mode, scaling, last BN
    (`verify` holds their conditioning against what was recorded with them).

    A network of the zoo built with other arguments (`num_classes=100`), or given a last BN by `insert_last_bn`, is
    held against one built with the same; what only the registered one has a record of is skipped, and says so.
    timm's own networks do not say what they were built with: of `resnet18` ... `resnet152`, the plain twins of
    `resnet18_lastbn` ..., other classes, channels, pooling and a last BN are known. Dropout is left out of all checks.

    Args:
        name_or_model: a registered name; a checkpoint by its released name ("arch.tag") or path; or a network of the
            zoo, or a plain twin, at its default initialization.
        seed: of the initialization, where it is built here, and of the images.
        trained: the network given is trained; a checkpoint by its name is known to be.

    Raises:
        ValueError: an unknown name, or a network that is not of the zoo (it has no promises to hold).
        TypeError: neither a name nor a path nor a module.
    """
    # whatever the caller has set: seeded generators are of one device, and checks differentiate; the caller's random
    # stream is left alone by networks that are built or loaded here
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        without_synchronization(),
    ):
        model: str | nn.Module
        if isinstance(name_or_model, Path) or (isinstance(name_or_model, str) and is_checkpoint(name_or_model)):
            said, model, trained = str(name_or_model), load_checkpoint(name_or_model), True
        else:
            said, model = "", name_or_model
        subject = prepare(model, seed)
        checks = _all_checks(subject, fresh=not trained)
    return Validation(said or subject.info.name, checks)


def is_checkpoint(text: str) -> bool:
    """Whether this is a checkpoint's released name ("arch.tag") or path, and not a network's name."""
    if "." in text:
        return True
    try:
        zoo_info(text)
    except ValueError:
        return is_path(text)
    return False


def _all_checks(subject: Subject, fresh: bool) -> tuple[Check, ...]:
    """Those that apply; the ones of an initialization to a `fresh` network alone."""
    recorded = subject.info.name in initial_records()  # other sizes than the registered are built, and have no record
    promises: dict[str, tuple[bool, Callable[[Subject], Check]]] = {
        "size": (True, check_size),
        "function": (recorded, check_function),
        "weights": (fresh, check_initialization),
        "signals": (fresh, check_signals),
        "finite": (True, check_finite),
        "backward": (True, check_backward),
        "eval mode": (True, check_evaluation),
        "scaling": (True, check_scaling),
        "last BN": (subject.info.last_bn, check_last_bn),
        "conditioning": (fresh and recorded, check_conditioning),
    }
    return tuple(_checked(name, check, subject) for name, (applies, check) in promises.items() if applies)


def _checked(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    """A network so broken that its check cannot even run has not kept the promise."""
    try:
        return check(subject)
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
