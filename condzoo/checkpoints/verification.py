"""`verify_checkpoint`: everything a checkpoint claims, checked again, one row a claim."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import condzoo
from condzoo.checkpoints.folder import (
    CARD,
    CONFIG,
    CONVERSION,
    EXPECTED,
    METRICS,
    RECIPE,
    SUMS,
    WEIGHTS,
    CheckpointFolder,
    folder_at,
    read_folder,
)
from condzoo.checkpoints.loading import is_path, load_weights, read_recipe, release_by_name
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.records import Config, Conversion, Expected, Metrics, read_conditioning, read_record
from condzoo.checkpoints.remeasuring import (
    count_correct,
    eigenvalue_difference,
    initial_network,
    lambda_max_difference,
    largest_difference,
    logits_difference,
    measure_conditioning,
    read_images,
)
from condzoo.data import DataSet
from condzoo.models.released import Release, read_index, release_folder
from condzoo.models.weight_files import in_float32, sha256
from condzoo.probe.arithmetic import full_float32

LOGITS_TOLERANCE = 1e-4  # of the largest logit: what other hardware's order of summation may move
# of lambda_max, on the kind of processor that recorded it. Before training BatchNorm divides by smaller variances:
# mlp20x256_bn's differed by 7e-4 when measured again. Arithmetic without AVX moves mlp8x24_bn's by 5 %, 0.8 % at the
# end: on such a processor verify fails.
LAMBDA_MAX_TOLERANCE = {"at_init": 1e-2, "at_end": 1e-3}
EIGENVALUE_TOLERANCE = 0.1  # those above the noise floor are right to about 5 %, here and where they were recorded


@dataclass(frozen=True)
class Check:
    """One claim: `ok` is None where it was not checked; `detail` says what was found."""

    check: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """The checks of one checkpoint, in the order they were made; the first that fails may be the last."""

    name: str
    path: Path
    rows: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(row.ok is not False for row in self.rows)


def verify_checkpoint(path: str | Path, data_root: str | Path | None = None) -> Verification:
    """Check a checkpoint: sums, the index's hash, keys, logits, model card; with its data, accuracy and conditioning.

    Args:
        path: a checkpoint's folder or the model.safetensors in it, or a released name ("arch.tag", or "arch" for its
            default).
        data_root: where its data set is; None looks where `load_data` does, and leaves out what needs it
            where it is not found.

    Raises:
        ValueError, FileNotFoundError: no such checkpoint, or no data under an explicit `data_root`. A file that is
            wrong is a row that failed, not an exception.
    """
    by_path = is_path(path)
    if by_path:
        place = folder_at(Path(path))
        release = read_index().get(place.resolve().name)
    else:
        release = release_by_name(str(path))
        place = release_folder(release)
    with as_recorded():
        rows = tuple(checks(place, release, data_root, linked=not by_path))
    return Verification(release.name if release else place.resolve().name, place, rows)


def verify_released(data_root: str | Path | None = None) -> Iterator[Verification]:
    """Each released checkpoint's verification; one that cannot be reached, or whose data cannot, has a failed row.

    Args:
        data_root: as for `verify_checkpoint`.
    """
    for release in read_index().values():
        place, rows = Path(release.name), list[Check]()
        try:
            place = release_folder(release)
            with as_recorded():
                for row in checks(place, release, data_root, linked=True):
                    rows.append(row)
        except (ValueError, OSError) as error:
            rows.append(Check("reached", False, str(error).splitlines()[0]))
        yield Verification(release.name, place, tuple(rows))


@contextmanager
def as_recorded() -> Iterator[None]:
    """Inside, torch computes as where records are made, whatever the caller has set: on the CPU, in float32 alone."""
    # generators are of one device; the probe takes gradients of weights, which those made in inference mode have not
    with torch.device("cpu"), torch.inference_mode(False), in_float32(), full_float32("cpu"):
        yield


def checks(place: Path, release: Release | None, data_root: str | Path | None, linked: bool) -> Iterator[Check]:
    """The rows; stops after a failure that leaves nothing to check further. `linked` as for `read_folder`."""
    try:
        folder = read_folder(place, linked)
        model = load_weights(folder)
    except (ValueError, OSError) as error:
        yield Check("files", False, str(error))
        return
    weights = sum(p.numel() for p in model.parameters())
    yield Check("files", True, f"{len(folder.files)} files as in {SUMS}; {weights:,} parameters fit, all finite")
    yield check_index(folder, release)
    yield attempt("logits", check_logits, folder, model)
    yield attempt("model card", check_card, folder)
    if folder.trained:
        yield from check_on_data(folder, model, data_root)


def attempt(check: str, function: Callable[..., tuple[bool | None, str]], *arguments: Any) -> Check:
    """One row; whatever its files make of it, a check that cannot be done has failed."""
    try:
        return Check(check, *function(*arguments))
    except ValueError as error:
        return Check(check, False, str(error))
    except Exception as error:  # a record that is whole by its schema may still say what makes no sense
        return Check(check, False, f"{type(error).__name__}: {error}")


def check_index(folder: CheckpointFolder, release: Release | None) -> Check:
    """The weights' SHA-256, and how images are prepared, against the package's index."""
    if release is None:
        return Check("index", None, f"{folder.path.resolve().name} is not a released name; its own sums hold")
    here = sha256(folder.files[WEIGHTS])
    if here != release.sha256:
        return Check("index", False, f"{here[:12]}..., the index has {release.sha256[:12]}...")
    described = read_record(folder, CONFIG, Config).pretrained_cfg
    for field, wanted in release.input.items():
        found = getattr(described, field, None)
        if found != wanted:
            return Check("index", False, f"{CONFIG} has {field} = {found}, the index has {wanted}")
    return Check("index", True, f"SHA-256 {here[:12]}...")


def check_logits(folder: CheckpointFolder, model: nn.Module) -> tuple[bool, str]:
    """The logits on the fixed synthetic input."""
    difference = logits_difference(model, read_record(folder, EXPECTED, Expected))
    return difference <= LOGITS_TOLERANCE, f"largest difference {difference:.1e} of the largest logit"


def check_card(folder: CheckpointFolder) -> tuple[bool | None, str]:
    """README.md is what `model_card` makes of the other files; not known of one that another version has worded."""
    if folder.text(CARD) == model_card(folder):
        return True, f"{CARD} is up to date"
    if folder.trained:
        maker = read_record(folder, METRICS, Metrics).packages.get("condzoo") or condzoo.__version__
    else:  # those of before it was recorded do not say it
        maker = read_record(folder, CONVERSION, Conversion).condzoo or "of another version"
    if maker != condzoo.__version__:
        return None, f"made by condzoo {maker}, and not as {condzoo.__version__} words it"
    return (
        False,
        f"{CARD} is not what the other files say (refresh_cards in condzoo.checkpoints.writing makes it again)",
    )


def check_on_data(folder: CheckpointFolder, model: nn.Module, data_root: str | Path | None) -> Iterator[Check]:
    """Accuracy to the last image, and the conditioning record."""
    recipe = read_recipe(folder)
    try:
        data = read_images(recipe, data_root)
    except FileNotFoundError as error:
        if data_root is not None:
            raise
        for check in ("accuracy", "conditioning"):
            yield Check(check, None, f"not checked without its data: {str(error).splitlines()[0]}")
        return
    except Exception as error:
        yield Check("accuracy", False, f"the data that {folder.source(RECIPE)} names cannot be read: {error}")
        return
    yield attempt("accuracy", check_accuracy, folder, model, data)
    yield attempt("conditioning", check_conditioning, folder, model, data, recipe)


def check_accuracy(folder: CheckpointFolder, model: nn.Module, data: DataSet) -> tuple[bool, str]:
    """The number of test images classified rightly, and that config.json standardizes images as it was counted on."""
    described = read_record(folder, CONFIG, Config).pretrained_cfg
    for field, values, own in (("mean", described.mean, data.mean), ("std", described.std, data.std)):
        wanted = tuple(value / 255 for value in own)  # as `release` writes them; some are sums over the images
        if not np.allclose(values, wanted, rtol=1e-6, atol=0):
            return False, f"{CONFIG} has {field} = {values}, the recipe's data has {wanted}"
    metrics = read_record(folder, METRICS, Metrics)
    correct, images = count_correct(model, data), data.size("test")
    same = (correct, images) == (metrics.test_correct, metrics.test_images)
    recorded = "as recorded" if same else f"recorded {metrics.test_correct:,} of {metrics.test_images:,}"
    return same, f"{correct:,} of {images:,} test images right, {recorded}"


def check_conditioning(
    folder: CheckpointFolder, model: nn.Module, data: DataSet, recipe: dict[str, Any]
) -> tuple[bool, str]:
    """lambda_max and every eigenvalue of each layer's input and output gradient, at initialization and at the end."""
    recorded = read_conditioning(folder)
    found, same = [f"{len(recorded['at_end'])} layers"], True
    network = initial_network(recipe, data)  # with the recipe's dropout, which config.json does not have
    for when in ("at_init", "at_end"):
        if when == "at_end":
            network.load_state_dict(model.state_dict())
        measured = measure_conditioning(network, data, recipe["data"]["batch_size"])
        for what, compare, tolerance in (
            ("lambda_max", lambda_max_difference, LAMBDA_MAX_TOLERANCE[when]),
            ("each eigenvalue", eigenvalue_difference, EIGENVALUE_TOLERANCE),
        ):
            difference, layer = largest_difference(measured, recorded[when], compare)
            same &= difference <= tolerance  # not so for NaN
            found.append(f"{when} {what} within {difference:.1e}" + (f" ({layer})" if layer else ""))
    return same, ", ".join(found)
